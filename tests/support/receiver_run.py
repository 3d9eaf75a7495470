"""What the receiver's tests share: a data set, scripted servers (fake_verifier.py), a run, and a rank's eyes."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dflash_scale.config.run import Config, parse_config
from dflash_scale.data.dataset import Samples, load_prepared
from dflash_scale.data.dataset_writer import FEATURES, FORMAT
from dflash_scale.data.schedule import Row, RowSchedule, schedule_spec
from dflash_scale.fleet.state import Key
from dflash_scale.receiver.client import Receiver, ReceiverSpec, spawn_receiver
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.server.process import free_port
from dflash_scale.transport.ring import COMMITTED, Ring
from tests.support.fake_verifier import LAYOUT, states

SAMPLES, VALIDATION, LONGEST = 60, 6, 40
RUN = f"receivertest{os.getpid()}"
LAYOUTS = RowLayouts(LAYOUT.only((1, 4)), LAYOUT)


@dataclass
class FakeServer:
    """A fake verifier process on ports of its own; it can be killed and started again."""

    script: dict[int, list[str]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    http: int = field(default_factory=free_port)
    zmq: int = field(default_factory=free_port)
    public_zmq: int | None = None  # where a proxy listens for it
    data_parallel_rank: int | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "FakeServer":
        here = Path(__file__).with_name("fake_verifier.py")
        command = [sys.executable, str(here), "--http", str(self.http), "--zmq", str(self.zmq)]
        self.process = subprocess.Popen([*command, "--script", json.dumps(self.script), *self.arguments])
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def addresses(self) -> dict[str, str]:
        return {"http": f"http://127.0.0.1:{self.http}", "zmq": f"tcp://127.0.0.1:{self.public_zmq or self.zmq}"}

    @property
    def entry(self) -> dict[str, Any]:
        """Of stream.servers."""
        return {**self.addresses, "data_parallel_rank": self.data_parallel_rank}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name, count in (("train", SAMPLES), ("validation", VALIDATION)):
        ids = [draw.integers(0, 1000, draw.integers(5, LONGEST + 1)).tolist() for _ in range(count)]
        masks = [[1] * len(tokens) for tokens in ids]
        split = datasets.Dataset.from_dict({"input_ids": ids, "loss_mask": masks}, features=FEATURES)
        split.save_to_disk(str(folder / name))
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "fingerprint": "random"}))
    return folder


class Run:
    """A run's configuration, its servers and its receiver; everything is ended by `close`."""

    def __init__(self, data: Path, folder: Path, servers: list[FakeServer], **stream: Any) -> None:
        self.servers, self.folder = servers, folder
        self.receiver: Receiver | None = None
        section = {
            "servers": [server.entry for server in servers],
            "ring_bytes": 8 * LONGEST * LAYOUT.bytes_per_token,
            "credit_bytes": 1 << 20,
            "server_credit_bytes": 1 << 19,
            "requests_per_server": 8,
            "lookahead_rows": 3,
            "request_timeout_s": 2.0,
            "attempts": 3,
            "probe_s": 0.3,
            "no_server_timeout_s": 20.0,
            **stream,
        }
        content = {
            "verifier": {"model": "fake"},
            "data": {"path": str(data), "row_tokens": 96},
            "stream": section,
            "train": {"rows_per_step": 2, "epochs": 2, "validate_every": 10, "output_dir": str(folder)},
        }
        self.config: Config = parse_config(content)
        prepared = load_prepared(data)
        self.samples = Samples(prepared.train, prepared.validation)

    def rows(self, world: int, rank: int, first_step: int = 1) -> list[Row]:
        return list(RowSchedule(self.samples, schedule_spec(self.config, world)).rows(rank, first_step))

    def spec(self, world: int = 1, first_step: int = 1) -> ReceiverSpec:
        return ReceiverSpec(
            run_id=RUN,
            config=self.config,
            world_size=world,
            ranks=tuple(range(world)),
            first_step=first_step,
            parent_pid=os.getpid(),
            layouts=LAYOUTS,
            status=self.folder / "status.json",
        )

    def spawn(self, world: int = 1, first_step: int = 1) -> Receiver:
        self.receiver = spawn_receiver(self.spec(world, first_step))
        return self.receiver

    def status(self) -> dict[str, Any]:
        """The status file as it lies on the disk; empty if there is none yet."""
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def close(self) -> None:
        for server in self.servers:
            server.kill()
        if self.receiver is not None:
            self.receiver.close()


@pytest.fixture
def make_run(data: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(servers: list[FakeServer], **stream: Any) -> Run:
        runs.append(Run(data, tmp_path, servers, **stream))
        return runs[-1]

    yield make
    for run in runs:
        run.close()
    assert [path for path in Path("/dev/shm").iterdir() if RUN in path.name] == []


Each = Callable[[int], None]


def ignore(count: int) -> None:
    pass


def consume(ring: Ring, rows: list[Row], samples: Samples, lookahead: int, each: Each = ignore) -> dict[Key, int]:
    """Reads a ring as a rank does, checks every byte against the data set, and gives each sample's status."""
    missing = [{(row.epoch, place.sample) for place in row.places} for row in rows]
    got: dict[Key, int] = {}
    mark = 0
    while True:
        while mark < len(rows) and not missing[mark]:
            mark += 1
        ring.reader_mark = mark
        if mark == len(rows):
            return got
        record = ring.next_record(timeout=120)
        assert record is not None, f"nothing for 120 s at row {mark} of {len(rows)}"
        key = (record.epoch, record.sample)
        assert key not in got, f"{key} came twice"
        home = [index for index in range(mark, min(mark + lookahead, len(rows))) if key in missing[index]]
        assert home, f"{key} lies in no row of the window {mark}..{mark + lookahead}"
        missing[home[0]].remove(key)
        got[key] = record.status
        if record.status == COMMITTED:
            token_ids = samples.tokens(record.sample).astype("<i4").tobytes()
            assert record.tokens * 4 == len(token_ids)
            assert bytes(record.payload) == states(token_ids, LAYOUTS.of(rows[home[0]])), f"{key} has other bytes"
        else:
            assert len(record.payload) == 0
        ring.release()
        each(len(got))


def read_all(ring: Ring) -> None:
    while ring.next_record(timeout=10) is not None:
        ring.release()


def expected(rows: list[Row]) -> set[Key]:
    return {(row.epoch, place.sample) for row in rows for place in row.places}


def drain(run: Run, receiver: Receiver, rank: int = 0, world: int = 1, each: Each = ignore) -> Counter[int]:
    """Consumes one rank's whole schedule; gives how many samples had which status."""
    ring = Ring.open(receiver.ring_names[rank], timeout=60)
    rows = run.rows(world, rank)
    got = consume(ring, rows, run.samples, run.config.stream.lookahead_rows, each)
    assert set(got) == expected(rows)
    ring.close()
    return Counter(got.values())


BAD = ("corrupt", "truncated", "layout", "tokens", "extra-frame", "garbage", "twice", "stranger", "silent", "refuse")
