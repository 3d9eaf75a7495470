"""`dflash-scale generate`: asks the servers for the hidden states of a whole data set and writes them to the cache.

    dflash-scale generate --config configs/zero2_dflash.json --out states/qwen3-8b

Every file holds all aux layers and the last layer, whatever the run's loss needs. It can be stopped, or killed,
and started again: files that are there and good are left as they are. Samples that no server could deliver stand in
`quarantined.jsonl` with their reasons and are asked for again by the next start. The counts of the last start are in
`totals.json`: samples = present + written + quarantined when it is complete.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import signal
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from dflash_scale.cache.folder import CacheOrigin, claim_folder, open_cache
from dflash_scale.commands import edge
from dflash_scale.config.run import Config, load_config
from dflash_scale.data.dataset import Samples, check_tokenizer, load_prepared
from dflash_scale.files import write_file
from dflash_scale.fleet.fleet import NoServerError
from dflash_scale.receiver.cache_sink import CacheSink, CacheUnwritable
from dflash_scale.receiver.connections import Identity
from dflash_scale.receiver.endpoints import Endpoints
from dflash_scale.receiver.loop import ReceiverLoop
from dflash_scale.receiver.process import keep_freed_memory, limits_of
from dflash_scale.receiver.requests import Requests, SampleRequests
from dflash_scale.training.run import resolve_verifier
from dflash_scale.transport.keys import receiver_keys
from dflash_scale.verifier.identity import origin_of

log = logging.getLogger(__name__)

LINE_EVERY_S: Final = 10.0  # where no terminal is


def run(args: Namespace) -> int:
    """0 when every sample is accounted for, 143 when a signal ended it early, 1 when servers or disk did."""
    config = load_config(args.config, args.set)
    folder = args.out or config.stream.cache
    if folder is None:
        raise ValueError("got no folder to write to; give --out DIR, or stream.cache in the configuration")
    check_stream(config)
    keep_freed_memory()
    return generate(config, Path(folder))


def check_stream(config: Config) -> None:
    """Raises ValueError for a stream that cannot fill a cache."""
    if config.stream.transport == "fp8":
        raise ValueError(
            'stream.transport: got "fp8", wanted "exact" or "bf16" because files of the cache hold no scales; set one'
        )
    if not config.stream.servers and config.stream.endpoints_file is None:
        raise ValueError(
            "stream.servers: got none, wanted at least one {http, zmq}; name a server of the fleet, or a "
            "stream.endpoints_file"
        )


def generate(config: Config, folder: Path) -> int:
    """Fills the folder. Raises ValueError for what does not fit together."""
    prepared = load_prepared(config.data.folder)
    check_tokenizer(prepared, config.verifier.model)
    requests = SampleRequests(Samples(prepared.train, prepared.validation))
    verifier = resolve_verifier(config, allow_network=True)
    return write_totals(fill_cache(config, requests, folder, verifier.cache_origin(prepared.fingerprint)), folder)


@dataclass(frozen=True, slots=True)
class Filled:
    """How far it came. `totals`: `CacheSink.status`; `problem`: what ended it early other than a signal."""

    complete: bool
    totals: dict[str, Any]
    problem: str

    @property
    def status(self) -> int:
        """Of the process."""
        if self.problem:
            return edge.FAILED
        return edge.DONE if self.complete else edge.STOPPED


def fill_cache(config: Config, requests: Requests, folder: Path, cache_origin: CacheOrigin) -> Filled:
    """Asks the servers for every sample that is not in the folder, until all are there, or a signal comes.

    Raises:
        ValueError: the folder is not of this origin, or a sample is larger than the credit.
    """
    limits, layout = limits_of(config.stream), cache_origin.layout
    longest = int(requests.lengths.max()) * layout.bytes_per_token
    if limits.server_credit_bytes < longest:
        raise ValueError(
            f"stream.server_credit_bytes: got {limits.server_credit_bytes}, wanted at least {longest} bytes as the "
            f"longest sample has {requests.lengths.max()} tokens of {layout.bytes_per_token} bytes; use --set "
            f"stream.server_credit_bytes={longest}, or shorter samples"
        )
    claim_folder(folder, cache_origin, writable=True)
    run_id = secrets.token_hex(6)
    keys = None if config.stream.keys is None else receiver_keys(Path(config.stream.keys))
    identity = Identity(run_id, f"{run_id}:generate:{os.getpid()}", layout, origin_of(config.verifier.model), keys)
    fill = CacheSink(requests, open_cache(folder, layout), layout, limits.credit_bytes)
    asking = config.stream.model_copy(update={"mode": "online"})  # whatever the run does with the folder
    loop = ReceiverLoop(Endpoints(asking), limits, identity, fill, requests, None)
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: signals.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    progress = Progress(len(requests.lengths))
    problem = ""
    try:
        while not fill.complete and not signals:
            loop.step()
            progress.show(fill.status(), loop.blocked_on)
    except (NoServerError, CacheUnwritable) as error:
        problem = str(error)
    finally:
        loop.close()
        try:
            fill.close()
        except CacheUnwritable as error:
            problem = problem or str(error)
        for number, handler in before.items():
            signal.signal(number, handler)
    progress.end()
    return Filled(fill.complete, fill.status(), problem)


def write_totals(filled: Filled, folder: Path) -> int:
    """Writes and prints the totals; gives the exit status."""
    totals = {"complete": filled.complete, **filled.totals}
    write_file(folder / "totals.json", json.dumps(totals, indent=1) + "\n")
    print(
        f"{folder}: {totals['samples']:,} samples, {totals['present']:,} present, {totals['written']:,} written "
        f"({totals['written_bytes'] / 1e9:.2f} GB), {totals['quarantined']:,} quarantined"
    )
    if filled.problem:
        return edge.fail("generate", f"{filled.problem}\nstart it again to go on", filled.status)
    return filled.status


class Progress:
    """How far it is and what limits it, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, samples: int) -> None:
        self._terminal = sys.stderr.isatty()
        file = sys.stderr if self._terminal else io.StringIO()
        self._bar = tqdm(total=samples, unit="sample", dynamic_ncols=True, file=file)
        self._next = time.monotonic() + LINE_EVERY_S

    def show(self, status: dict[str, Any], blocked_on: str) -> None:
        """Call it often."""
        text = f"{status['written_bytes'] / 1e9:,.2f} GB written · bottleneck: {blocked_on}"
        if status["quarantined"]:
            text += f" · {status['quarantined']:,} quarantined"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(status["present"] + status["written"] + status["quarantined"] - self._bar.n)
        now = time.monotonic()
        if not self._terminal and now >= self._next:
            self._next = now + LINE_EVERY_S
            print(self._bar, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves the bar."""
        self._bar.close()
