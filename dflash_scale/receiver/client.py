"""A rank's side of the receiver: the first rank of a node starts the process, and every rank opens its ring.

What the process is told is a `ReceiverSpec`, one JSON file; what it says is in `status.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from dflash_scale.config.run import Config, parse_config
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.receiver.status import Status, read_status
from dflash_scale.transport.ring import Ring, reclaim, ring_name

START_TIMEOUT_S: Final = 120.0  # until the rings are there: an interpreter's start and the allocation of their pages
STOP_TIMEOUT_S: Final = 10.0
PACE: Final = ("http", "healthy", "tokens_per_s", "http_p50_s", "http_p99_s", "data_p50_s", "data_p99_s", "errors")
# What ends a receiver. Not SIGTERM or SIGINT: launchers and terminals send those to every process of a run, and a rank
# that was asked to stop still needs the rows of its last step.
STOP_SIGNAL: Final = signal.SIGUSR1


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank runs. Launchers number the ranks of a node one after the other."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int  # ranks on this node

    @property
    def first(self) -> int:
        """The node's first rank."""
        return self.rank - self.local_rank


@dataclass(frozen=True, slots=True)
class ReceiverSpec:
    """What a receiver process is told.

    ranks: global ranks of this node, in the order of their local ranks · first_step: optimizer step (from 1) whose rows
    come first · layouts: what the run trains on · status: path of the status file.
    """

    run_id: str
    config: Config
    world_size: int
    ranks: tuple[int, ...]
    first_step: int
    parent_pid: int
    layouts: RowLayouts
    status: Path

    def dump(self) -> str:
        """As JSON."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        config = self.config.model_dump(mode="json")
        return json.dumps(
            content | {"config": config, "layouts": asdict(self.layouts), "status": str(self.status)}, indent=1
        )

    @classmethod
    def parse(cls, text: str) -> ReceiverSpec:
        """From `dump`. Raises ValueError."""
        content = json.loads(text)
        content["config"] = parse_config(content["config"], "the receiver's spec")
        content["ranks"] = tuple(content["ranks"])
        content["layouts"] = RowLayouts.from_params(content["layouts"])
        content["status"] = Path(content["status"])
        return cls(**content)


@dataclass(frozen=True, slots=True)
class Receiver:
    """A started receiver process and the names of its rings, one per rank of the spec."""

    process: subprocess.Popen[bytes]
    ring_names: tuple[str, ...]
    run_id: str

    def close(self) -> None:
        """Ends the process if it still runs, and removes what it could not remove itself."""
        if self.process.poll() is None:
            self.process.send_signal(STOP_SIGNAL)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        reclaim(f"dflash-{self.run_id}-{self.process.pid}-")


def spawn_receiver(spec: ReceiverSpec) -> Receiver:
    """Starts the receiver of a node; to be called by the main thread of the process that `spec.parent_pid` names.

    Returns at once: the rings can be opened (with a timeout) under the names of the result.
    """
    reclaim()  # what earlier runs on this machine left behind when they were killed
    spec.status.parent.mkdir(parents=True, exist_ok=True)
    path = spec.status.with_suffix(".spec.json")
    path.write_text(spec.dump(), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "dflash_scale.receiver.process", str(path)])
    names = tuple(ring_name(spec.run_id, process.pid, local) for local in range(len(spec.ranks)))
    return Receiver(process, names, spec.run_id)


@dataclass(slots=True)
class Stream:
    """A rank's side of the stream: its ring and, on the first rank of a node, the receiver."""

    ring: Ring
    status_path: Path
    receiver: Receiver | None

    @classmethod
    def start(cls, config: Config, layouts: RowLayouts, place: RankPlace, *, first_step: int, run_id: str) -> Stream:
        """Starts (first rank of a node) or awaits (the others) the receiver and opens this rank's ring.

        Raises:
            RuntimeError: the receiver did not come up.
        """
        status = Path(config.train.output_dir) / "stream" / f"{run_id}-rank{place.first}.json"
        if place.local_rank != 0:
            return cls(open_ring(await_ring_name(status, place.local_rank), None), status, None)
        receiver = spawn_receiver(
            ReceiverSpec(
                run_id=run_id,
                config=config,
                world_size=place.world_size,
                ranks=tuple(range(place.first, place.first + place.local_size)),
                first_step=first_step,
                parent_pid=os.getpid(),
                layouts=layouts,
                status=status,
            )
        )
        return cls(open_ring(receiver.ring_names[0], receiver), status, receiver)

    def status(self) -> Status | None:
        """The newest status of this node's receiver; None before the first."""
        return read_status(self.status_path)

    def servers(self) -> list[dict[str, Any]]:
        """How the servers of this node's receiver do, those that were not removed: what tells which one is slow."""
        status = self.status()
        servers = status.servers if status is not None else []
        return [{name: getattr(server, name) for name in PACE} for server in servers if not server.retired]

    def close(self) -> None:
        """Leaves the ring and ends the receiver. Call it when nothing reads the ring any more."""
        self.ring.close()
        if self.receiver is not None:
            self.receiver.close()


def open_ring(name: str, receiver: Receiver | None) -> Ring:
    """Waits for the receiver's ring, and no longer than the receiver lives."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return Ring.open(name, timeout=0.2)
        except FileNotFoundError:
            if receiver is not None and receiver.process.poll() is not None:
                code = receiver.process.returncode
                raise RuntimeError(
                    f"the receiver ended with status {code} before its rings were there; its message on stderr says why"
                ) from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"the receiver made no ring {name} within {START_TIMEOUT_S:g} s") from None


def await_ring_name(path: Path, local_rank: int) -> str:
    """The name of a rank's ring, from the status file of the receiver that another rank starts."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (status := read_status(path)) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the first rank of this node wrote no {path} within {START_TIMEOUT_S:g} s; "
                "its log says why, and train.output_dir must be the same folder for all ranks of a node"
            )
        time.sleep(0.05)
    return status.rings[local_rank]
