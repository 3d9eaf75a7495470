"""`dflash-scale answer`: the verifier's own answers to prompts, and the hidden states of both, from one request each.

    dflash-scale answer prompts.jsonl --config configs/zero2_dflash.json --out data/qwen3-8b --states states/qwen3-8b

It writes a prepared data set and a cache whose files are numbered as its samples, ready for `stream.mode` "offline".
The loss mask covers the answers. Which side of the split a sample falls on depends on its prompt and the seed alone.

It can be killed at any time, and started again with the same arguments. While it asks, the files are
numbered by the prompts and lie in STATES/.answering; when all prompts are answered or given up, it writes the data set
there, then the numbers that the files will have, then renames the files, and the data set last. Options of the split
that are other than those of the start that wrote the numbers come too late, and are not looked at.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dflash_scale.cache.folder import Cache, CacheOrigin, claim_folder, open_cache, read_manifest
from dflash_scale.commands import edge
from dflash_scale.commands.generate import check_stream, fill_cache
from dflash_scale.config.run import Config, load_config
from dflash_scale.data.conversations import BadLine, Encoded
from dflash_scale.data.dataset import load_prepared, tokenizer_hash
from dflash_scale.data.dataset_writer import PreparedWriter, check_fraction
from dflash_scale.data.prepare import find_files, lines_of, make_encoder
from dflash_scale.files import new_folder, write_file
from dflash_scale.receiver.cache_sink import QUARANTINED_FILE
from dflash_scale.receiver.process import keep_freed_memory
from dflash_scale.receiver.requests import PromptRequests, Sampling
from dflash_scale.training.run import resolve_verifier
from dflash_scale.verifier.files import load_tokenizer

WORK: Final = ".answering"  # in the folder of the states: renaming works within one file system only
NUMBERS: Final = "numbers.json"  # prompt -> sample; once it is there, nothing is asked any more
DATA: Final = "data"
LOCK: Final = "lock"
UNANSWERED: Final = "unanswered.jsonl"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be answered, how, and where it goes."""

    sources: Sequence[str]
    out: Path
    states: Path
    sampling: Sampling
    validation_fraction: float
    seed: int


@dataclass(frozen=True, slots=True)
class Asked:
    """One line of the sources: its prompt, (n,) int32, or why it has none."""

    file: str
    line: int
    prompt: npt.NDArray[np.int32] | str


def run(args: Namespace) -> int:
    """0 when data set and cache are there, 143 when a signal ended it early, 1 when servers or disk did."""
    config = load_config(args.config, args.set)
    states = args.states or config.stream.cache
    if states is None:
        raise ValueError("got no folder for the hidden states; give --states DIR, or stream.cache in the configuration")
    if args.answer_tokens < 2 or args.max_tokens < 3 or not 0 <= args.temperature < float("inf"):
        raise ValueError(
            f"got --answer-tokens {args.answer_tokens}, --max-tokens {args.max_tokens} and --temperature "
            f"{args.temperature}, wanted at least 2, at least 3 and a number from 0"
        )
    check_fraction(args.validation_fraction)
    check_stream(config)
    keep_freed_memory()
    sampling = Sampling(args.answer_tokens, args.max_tokens, args.temperature)
    out = Path(args.out or config.data.folder)
    return answer(config, Order(args.sources, out, Path(states), sampling, args.validation_fraction, args.seed))


def answer(config: Config, order: Order) -> int:
    """Asks, numbers and places. Raises ValueError for what does not fit together."""
    work = order.states / WORK
    out, states = order.out.resolve(), order.states.resolve()
    if out == states or out in states.parents or states in out.parents:
        raise ValueError(f"got {order.out} and {order.states}, wanted two folders beside each other; name another one")
    if not work.exists() and (order.out.exists() or (order.states.exists() and any(order.states.iterdir()))):
        there = order.out if order.out.exists() else order.states
        raise ValueError(f"{there} exists, wanted a new folder; remove it, or name another")
    files = find_files(order.sources)
    encoder = make_encoder(config.verifier.model, order.sampling.max_tokens)
    asked = []
    for file, line, text in lines_of(files):
        try:
            asked.append(Asked(file, line, encoder.prompt(text)))
        except BadLine as error:
            asked.append(Asked(file, line, str(error)))
    prompts = [each.prompt for each in asked if not isinstance(each.prompt, str)]
    if not prompts:
        first = f": {asked[0].file}:{asked[0].line}: {asked[0].prompt}" if asked else ""
        raise ValueError(f"{', '.join(map(str, files))}: no line has a prompt{first}")
    verifier = resolve_verifier(config, allow_network=True)
    origin = verifier.cache_origin(_fingerprint(order, prompts))
    found = read_manifest(work)
    if found is not None and found.data_fingerprint != origin.data_fingerprint:
        raise ValueError(
            f"{work} holds an unfinished start with other prompts or options; start with those to finish it, or remove "
            f"{order.states}"
        )
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another start of this command works in {work}; wait for its end") from None
        return _answer(config, order, asked, PromptRequests(prompts, order.sampling), origin)


def _answer(config: Config, order: Order, asked: Sequence[Asked], requests: PromptRequests, origin: CacheOrigin) -> int:
    work, prompts = order.states / WORK, len(requests.lengths)
    if not (work / NUMBERS).exists():
        if order.out.exists():
            raise ValueError(f"{order.out} exists, wanted a new folder; remove it, or name another")
        filled = fill_cache(config, requests, work, origin)
        if not filled.complete:
            done, problem = filled.totals["present"] + filled.totals["written"], filled.problem or "stopped"
            told = f"{problem}\n{done:,} of {prompts:,} prompts are answered; start it again to go on"
            return edge.fail("answer", told, filled.status)
        _number(config, order, asked, requests, open_cache(work, origin.layout))
    _place(order, origin)
    print_summary(order)
    return edge.DONE


def _fingerprint(order: Order, prompts: Sequence[npt.NDArray[np.int32]]) -> str:
    """A digest of everything that the answers depend on, the verifier aside."""
    digest = hashlib.blake2b(json.dumps(asdict(order.sampling)).encode(), digest_size=8)
    for prompt in prompts:
        digest.update(len(prompt).to_bytes(8, "little") + prompt.astype("<i4").tobytes())
    return digest.hexdigest()


def _number(config: Config, order: Order, asked: Sequence[Asked], requests: PromptRequests, cache: Cache) -> None:
    """Writes the data set, and which sample each file becomes."""
    data, reasons = cache.folder / DATA, _reasons(cache.folder)
    shutil.rmtree(data, ignore_errors=True)  # of a start that ended here
    data.mkdir()
    writer = PreparedWriter(data, order.validation_fraction, order.seed)
    places: dict[int, tuple[str, int]] = {}
    unanswered = []
    number = -1
    for each in asked:
        if isinstance(each.prompt, str):
            writer.add((each.file, each.line, each.prompt))
            continue
        number += 1
        if number in reasons:
            unanswered.append({"file": each.file, "line": each.line, "reason": reasons[number]})
            writer.add((each.file, each.line, f"no server answered: {reasons[number]}"))
            continue
        tokens = np.frombuffer(cache.token_ids(number, int(requests.lengths[number])), "<i4").astype(np.int32)
        mask = np.arange(len(tokens)) >= len(each.prompt)
        sample = Encoded(tokens, mask, truncated=len(tokens) == int(requests.lengths[number]))
        if (place := writer.add((each.file, each.line, sample), by=each.prompt)) is not None:
            places[number] = place
    if not places:
        why = f"; the first: {next(iter(reasons.values()))}" if reasons else ""
        raise ValueError(
            f"none of {number + 1} prompts has an answer to train on, {len(reasons)} got none at all{why}; "
            "look at the servers and start again"
        )
    model = config.verifier.model
    manifest = writer.finish(
        {
            "model": model,
            "tokenizer": tokenizer_hash(load_tokenizer(model)),
            "sources": [str(path) for path in find_files(order.sources)],
            "validation_fraction": order.validation_fraction,
            "seed": order.seed,
            **asdict(order.sampling),
        }
    )
    first = {"train": 0, "validation": manifest["counts"]["train"]}
    numbers = {prompt: first[split] + place for prompt, (split, place) in places.items()}
    write_file(cache.folder / UNANSWERED, "".join(json.dumps(line) + "\n" for line in unanswered))
    write_file(cache.folder / NUMBERS, json.dumps(numbers))


def _reasons(work: Path) -> dict[int, str]:
    """prompt -> why it has no answer."""
    lines = [json.loads(line) for line in (work / QUARANTINED_FILE).read_text(encoding="utf-8").splitlines()]
    return {line["sample"]: line["reason"] for line in lines}


def _place(order: Order, origin: CacheOrigin) -> None:
    """Puts files and data set where they belong. Every step may be the second of its kind after a kill."""
    work = order.states / WORK
    numbers: dict[str, int] = json.loads((work / NUMBERS).read_text(encoding="utf-8"))
    fingerprint = load_prepared(work / DATA).fingerprint
    if order.out.exists() and load_prepared(order.out).fingerprint != fingerprint:
        raise ValueError(f"{order.out} exists and is another data set than {work / DATA}; name a new folder")
    claim_folder(order.states, replace(origin, data_fingerprint=fingerprint), writable=True)
    source, target = Cache(work, ()), Cache(order.states, ())
    for prompt, sample in numbers.items():
        if source.has(int(prompt)):
            os.rename(source.path(int(prompt)), target.path(sample))
    shutil.copyfile(work / UNANSWERED, order.states / UNANSWERED)
    if not order.out.exists():
        with new_folder(order.out) as aside:
            shutil.copytree(work / DATA, aside, copy_function=_link, dirs_exist_ok=True)
    done = order.states / f"{WORK}.done"
    os.rename(work, done)  # at once: half of it would look like the beginning
    shutil.rmtree(done)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP):
            raise
        shutil.copy2(source, target)  # another file system, or one without hard links


def print_summary(order: Order) -> None:
    manifest: dict[str, Any] = load_prepared(order.out).manifest
    counts, tokens = manifest["counts"], manifest["tokens"]
    nbytes = Cache(order.states, ()).size()[1]
    print(
        f"{order.out}: {counts['train']:,} samples to train on ({tokens['train']:,} tokens), {counts['validation']:,} "
        f"for validation; of {counts['lines']:,} lines {counts['bad']:,} invalid or not answered, "
        f"{counts['untrainable']:,} with answers too short, {counts['truncated']:,} truncated\n"
        f"{order.states}: their hidden states, {nbytes / 1e9:.2f} GB; "
        f"train on both with --set data.path={order.out} --set stream.mode=offline --set stream.cache={order.states}"
    )
