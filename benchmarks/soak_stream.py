"""Runs the stream for a long time while its receiver is ended again and again, and looks for what grows.

    python benchmarks/soak_stream.py --minutes 30 [--vllm] [--json FILE]

Two real servers (embedded, or vLLM with --vllm and $DFLASH_SCALE_VLLM_PYTHON) of the demo's verifier; a real receiver
process, ended at random by SIGKILL, by its own signal or by its rank's leaving, and started again at the step that it
had reached; this process is the rank, and checks that every sample of a row comes once and is whole. Every few seconds
it notes the resident memory, file descriptors and threads of the servers with all their processes (vLLM's engine is a
child) and of itself, those of each receiver at its oldest, and the run's segments in /dev/shm.

Growth compares the median of the last quarter with that of the second; the first is warm-up. The exit status is 1 if
anything grew by more than GROWTH and SLACK. A sample that comes twice, too short or not at all ends it at once.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

REPO: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # for launch/, which is not installed

from benchmarks.machine import stamp  # noqa: E402
from dflash_scale.config.run import Config, parse_config  # noqa: E402
from dflash_scale.data.dataset import Samples, load_prepared  # noqa: E402
from dflash_scale.data.prepare import prepare  # noqa: E402
from dflash_scale.data.schedule import Row, RowSchedule, schedule_spec  # noqa: E402
from dflash_scale.receiver.client import STOP_SIGNAL, Receiver, ReceiverSpec, open_ring, spawn_receiver  # noqa: E402
from dflash_scale.receiver.layouts import RowLayouts, run_layouts  # noqa: E402
from dflash_scale.transport.ring import COMMITTED, Ring  # noqa: E402
from dflash_scale.verifier.shape import verifier_shape  # noqa: E402
from launch.demo.main import Demo, servers  # noqa: E402
from launch.demo.verifier import STEPS, make_verifier  # noqa: E402

RUN: Final = f"soak{os.getpid()}"
SAMPLES: Final = 400
VERIFIER: Final = REPO / ".cache" / "demo" / f"verifier-{STEPS}"  # the demo's; made here if it is not there
VOCABULARY: Final = 2048  # its own
LOOK_S: Final = 5.0
LIFE_S: Final = (2.0, 40.0)  # of a receiver
ENDINGS: Final = ("kill", "signal", "leave")
GROWTH: Final = 1.05
SLACK: Final = {"rss_mb": 8.0, "fds": 4.0, "threads": 4.0, "segments": 0.0}


@dataclass
class Soak:
    """What runs, and what was seen of it."""

    config: Config
    layouts: RowLayouts
    samples: Samples
    rows: list[Row]
    folder: Path
    servers: dict[str, psutil.Process]
    row: int = 0  # the first that is not complete
    records: int = 0
    lives: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seen: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    next_look: float = 0.0

    def look(self, receiver: psutil.Process | None) -> None:
        """Notes what everything holds; a receiver only when it is old enough to have its memory."""
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_S
        watched = {**self.servers, "rank": psutil.Process()}
        if receiver is not None and time.time() - receiver.create_time() > LIFE_S[1] / 2:
            watched["receiver"] = receiver
        for name, process in watched.items():
            family = [process] if name == "rank" else [process, *process.children(recursive=True)]
            self.seen[f"{name} rss_mb"].append(sum(member.memory_info().rss for member in family) / 1e6)
            self.seen[f"{name} fds"].append(sum(member.num_fds() for member in family))
            self.seen[f"{name} threads"].append(sum(member.num_threads() for member in family))
        segments = [path for path in Path("/dev/shm").iterdir() if RUN in path.name]
        self.seen["run segments"].append(len(segments))

    def start(self) -> Receiver:
        """A receiver that goes on at the step of the first incomplete row."""
        step = self.rows[self.row].step
        self.row = next(i for i, row in enumerate(self.rows) if row.step == step)  # as a resumed run: whole steps
        return spawn_receiver(
            ReceiverSpec(
                run_id=RUN,
                config=self.config,
                world_size=1,
                ranks=(0,),
                first_step=step,
                parent_pid=os.getpid(),
                layouts=self.layouts,
                status=self.folder / "status.json",
            )
        )

    def live(self, ending: str, seconds: float) -> None:
        """One receiver from its start to its end."""
        receiver = self.start()
        process = psutil.Process(receiver.process.pid)
        try:
            ring = open_ring(receiver.ring_names[0], receiver)
            self.read(ring, process, time.monotonic() + seconds)
            if ending == "kill":
                receiver.process.kill()
            elif ending == "signal":
                receiver.process.send_signal(STOP_SIGNAL)
            ring.close()
            if receiver.process.wait(30) not in (0, -signal.SIGKILL):
                raise RuntimeError(f"a receiver ended with status {receiver.process.returncode}")
            self.lives[ending] += 1
        finally:
            receiver.close()

    def read(self, ring: Ring, receiver: psutil.Process, until: float) -> None:
        """Reads as a rank does, until the time or the last row."""
        first = self.row
        missing = [{(row.epoch, place.sample) for place in row.places} for row in self.rows[first:]]
        while time.monotonic() < until:
            while self.row < len(self.rows) and not missing[self.row - first]:
                self.row += 1
            ring.reader_mark = self.row - first
            if self.row == len(self.rows):
                self.row = 0  # all epochs are through: the next receiver begins again
                return
            self.look(receiver)
            record = ring.next_record(timeout=1.0)
            if record is None:
                continue
            key = (record.epoch, record.sample)
            near = range(self.row - first, min(self.row - first + self.config.stream.lookahead_rows, len(missing)))
            home = next((i for i in near if key in missing[i]), None)
            if home is None or record.status != COMMITTED:
                raise RuntimeError(f"sample {key} came twice, or was not asked for, or with status {record.status}")
            layout = self.layouts.of(self.rows[first + home])
            if len(record.payload) != int(self.samples.lengths[record.sample]) * layout.bytes_per_token:
                raise RuntimeError(f"sample {key} has {len(record.payload)} bytes")
            missing[home].remove(key)
            ring.release()
            self.records += 1

    def verdicts(self) -> Iterator[tuple[str, float, float, bool]]:
        """What was watched, its median in the second and in the last quarter, and whether that is flat."""
        for name, values in sorted(self.seen.items()):
            quarter = len(values) // 4
            if quarter < 2:
                continue
            early, late = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
            yield name, early, late, late <= early * GROWTH + SLACK[name.split()[-1]]


def make_data(folder: Path, verifier: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(SAMPLES):
        prompt, answer = (draw.integers(2, VOCABULARY, draw.integers(16, 120)).tolist() for _ in range(2))
        lines.append(json.dumps({"prompt_ids": prompt, "answer_ids": answer}))
    source = folder / "conversations.jsonl"
    source.write_text("\n".join(lines))
    prepare([source], str(verifier), folder / "data", validation_fraction=0.05)
    return folder / "data"


def soak(folder: Path, minutes: float, vllm_python: str | None, seed: int) -> Soak:
    verifier = make_verifier(VERIFIER)
    data, shipped = make_data(folder, verifier), REPO / "configs" / "demo.json"
    content = json.loads(shipped.read_text()) | {"verifier": {"model": str(verifier), "dtype": "float32"}}
    content["data"]["path"], content["train"]["epochs"] = str(data), 200
    content["stream"]["probe_s"] = 1.0
    demo = Demo(folder, folder, shipped, vllm_python, 180, SAMPLES)
    with servers(demo, parse_config(content)) as fleet:
        content["stream"]["servers"] = [{"http": server.http, "zmq": server.zmq} for server in fleet]
        config = parse_config(content)
        prepared = load_prepared(data)
        samples = Samples(prepared.train, prepared.validation)
        rows = list(RowSchedule(samples, schedule_spec(config, 1)).rows(0))
        layouts = run_layouts(config, verifier_shape(str(verifier)))
        processes = {f"server{i}": psutil.Process(server.process.pid) for i, server in enumerate(fleet)}
        run = Soak(config, layouts, samples, rows, folder, processes)
        draw, until = random.Random(seed), time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            run.live(draw.choice(ENDINGS), min(draw.uniform(*LIFE_S), until - time.monotonic()))
            print(f"\r{sum(run.lives.values())} receivers, {run.records:,} samples", end="", flush=True)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--vllm", action="store_true", help="real vLLM servers ($DFLASH_SCALE_VLLM_PYTHON)")
    parser.add_argument("--seed", type=int, default=0, help="of the lives and endings")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    python = os.environ.get("DFLASH_SCALE_VLLM_PYTHON", str(REPO / ".venv-vllm" / "bin" / "python"))
    machine = stamp(("pyzmq", "transformers"))
    with tempfile.TemporaryDirectory(prefix="dflash-soak-") as folder:
        run = soak(Path(folder), args.minutes, python if args.vllm else None, args.seed)
    verdicts = list(run.verdicts())
    print(f"\n{'':24}{'2nd quarter':>12}{'last':>12}")
    for name, early, late, flat in verdicts:
        print(f"{name:24}{early:12.1f}{late:12.1f}  {'flat' if flat else 'GROWS'}")
    if args.json:
        result: dict[str, Any] = {
            **machine,
            "minutes": args.minutes,
            "engine": "vllm" if args.vllm else "transformers",
            "receivers": dict(run.lives),
            "samples": run.records,
            "medians": {name: [round(early, 1), round(late, 1)] for name, early, late, _ in verdicts},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if verdicts and all(flat for *_, flat in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
