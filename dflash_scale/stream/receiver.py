"""The receiver: one process per node that asks the fleet for samples and fills the rings of the node's ranks.

    python -m dflash_scale.stream.receiver --spec FILE

The first rank of a node starts it (`Stream.start`) and it ends with that rank: on SIGUSR1, when the rank dies (the
kernel's parent-death signal, and a look at the parent's pid once a second), or when every sample is delivered. When it
fails, its traceback is on stderr, its exit status is not 0, and every rank sees a dead writer in its ring; when it
hangs, every rank sees one that does not beat.

Once a second it writes a status file (JSON, replaced atomically) for progress and reports:
state "starting" | "running" | "complete" | "stopped" · pid · rings [names] · issued, retried, committed,
committed_bytes, quarantined (counts of samples) · quarantined_samples [{epoch, sample, reason}], the first 1000 ·
dropped {reason: count} of messages · outstanding_bytes · blocked_on, and blocked_s {what: seconds}:
"readers" (a rank has not opened its ring), "no server" (none is healthy), "credit", "requests" (all slots in use),
"busy" (all servers say so), "servers" (all is requested), "cache" (files are being read), "ring" (full), "trainer"
(look-ahead used up) · servers, see `servers.Server.snapshot` · with a cache, cache {hits, misses, corrupt} and, where
it is written, {written, written_bytes, not_kept, stopped}.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dflash_scale.config import Config, parse_config
from dflash_scale.stream.layouts import RowLayouts
from dflash_scale.stream.links import keep_freed_memory
from dflash_scale.stream.ring import Ring, own_ring_name, reclaim, ring_name

log = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 120.0  # until the rings are there: an interpreter's start and the allocation of their pages
STOP_TIMEOUT_S: Final = 10.0
STATUS_EVERY_S: Final = 1.0
PACE: Final = ("http", "healthy", "tokens_per_s", "http_p50_s", "http_p99_s", "data_p50_s", "data_p99_s", "errors")
RING_SLACK: Final = 4096  # bytes: record headers, so that two samples of half of stream.ring_bytes fit
PR_SET_PDEATHSIG: Final = 1  # prctl(2)
# What ends a receiver. Not SIGTERM or SIGINT: launchers and terminals send those to every process of a run, and a rank
# that was asked to stop still needs the rows of its last step.
STOP_SIGNAL: Final = signal.SIGUSR1


@dataclass(frozen=True, slots=True)
class ReceiverSpec:
    """What a receiver process is told: one JSON file.

    ranks: global ranks of this node, in the order of their local ranks · first_step: optimizer step (from 1) whose rows
    come first · layouts: what the run trains on · status: path of the status file.
    """

    run_id: str
    config: dict[str, Any]
    world_size: int
    ranks: tuple[int, ...]
    first_step: int
    parent_pid: int
    layouts: RowLayouts
    status: str

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def parse(cls, text: str) -> ReceiverSpec:
        fields = json.loads(text)
        fields["ranks"], fields["layouts"] = tuple(fields["ranks"]), RowLayouts.from_params(fields["layouts"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Receiver:
    """A started receiver process and the names of its rings, one per rank of the spec."""

    process: subprocess.Popen[bytes]
    ring_names: tuple[str, ...]
    spec: ReceiverSpec

    def close(self) -> None:
        """Ends the process if it still runs, and removes what it could not remove itself."""
        if self.process.poll() is None:
            self.process.send_signal(STOP_SIGNAL)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        reclaim(f"dflash-{self.spec.run_id}-{self.process.pid}-")


def spawn_receiver(spec: ReceiverSpec) -> Receiver:
    """Starts the receiver of a node; to be called by the main thread of the process that `spec.parent_pid` names.

    Returns at once: the rings can be opened (with a timeout) under the names of the result.
    """
    reclaim()  # what earlier runs on this machine left behind when they were killed
    status = Path(spec.status)
    status.parent.mkdir(parents=True, exist_ok=True)
    path = status.with_suffix(".spec.json")
    path.write_text(spec.dump(), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "dflash_scale.stream.receiver", "--spec", str(path)])
    names = tuple(ring_name(spec.run_id, process.pid, local) for local in range(len(spec.ranks)))
    return Receiver(process, names, spec)


@dataclass(slots=True)
class Stream:
    """A rank's side of the stream: its ring and, on the first rank of a node, the receiver."""

    ring: Ring
    status_path: Path
    receiver: Receiver | None

    @classmethod
    def start(cls, config: Config, layouts: RowLayouts, *, first_step: int, run_id: str) -> Stream:
        """Starts (first rank of a node) or awaits (the others) the receiver and opens this rank's ring.

        The rank's place is read from the launcher's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE (for torchrun:
        LOCAL_WORLD_SIZE).

        Raises:
            RuntimeError: the receiver did not come up.
        """
        env = os.environ
        rank, world_size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        local_rank = int(env.get("LOCAL_RANK", "0"))
        local_size = int(env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or "1")  # deepspeed's name, torchrun's
        first = rank - local_rank  # launchers number the ranks of a node one after the other
        status = Path(config.train.output_dir) / "stream" / f"{run_id}-rank{first}.json"
        receiver = None
        if local_rank == 0:
            ranks = tuple(range(first, first + local_size))
            content = config.model_dump(mode="json")
            receiver = spawn_receiver(
                ReceiverSpec(run_id, content, world_size, ranks, first_step, os.getpid(), layouts, str(status))
            )
        name = receiver.ring_names[0] if receiver else await_ring_name(status, local_rank)
        return cls(open_ring(name, receiver), status, receiver)

    def status(self) -> dict[str, Any]:
        """The newest status of this node's receiver; empty before the first."""
        return read_status(self.status_path)

    def servers(self) -> list[dict[str, Any]]:
        """How the servers of this node's receiver do, those that were not removed: what tells which one is slow."""
        servers = self.status().get("servers", [])
        return [{key: server[key] for key in PACE} for server in servers if not server["retired"]]

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


def await_ring_name(status: Path, local_rank: int) -> str:
    """The name of a rank's ring, from the status file of the receiver that another rank starts."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (found := read_status(status)):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the first rank of this node wrote no {status} within {START_TIMEOUT_S:g} s; "
                "its log says why, and train.output_dir must be the same folder for all ranks of a node"
            )
        time.sleep(0.05)
    return str(found["rings"][local_rank])


def read_status(path: Path) -> dict[str, Any]:
    """A status file's content; empty if there is none yet."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


# The process.


class Stop:
    """Whether it is time to go: a signal came, or the parent is gone."""

    def __init__(self, parent_pid: int) -> None:
        self.reason = ""
        self._parent_pid = parent_pid
        signal.signal(STOP_SIGNAL, self._signalled)
        for ours in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ours, signal.SIG_IGN)
        # The kernel signals when the parent's thread ends; the look at the pid is for a parent that was gone already.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, STOP_SIGNAL, 0, 0, 0)

    def _signalled(self, number: int, frame: object) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def look(self) -> bool:
        if not self.reason and os.getppid() != self._parent_pid:
            self.reason = f"the training process {self._parent_pid} is gone"
        return bool(self.reason)


def write_status(path: str, content: dict[str, Any]) -> None:
    aside = f"{path}.{os.getpid()}"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(aside, path)


def serve(spec: ReceiverSpec, config: Config, rings: Sequence[Ring], stop: Stop) -> str:
    """Feeds the rings until everything is delivered or `stop` says so. Returns the final state."""
    names = [ring.name for ring in rings]
    write_status(spec.status, {"state": "starting", "pid": os.getpid(), "rings": names})
    intake = make_intake(spec, config, rings)
    try:
        delivery, next_status, state, unwritten = intake.delivery, 0.0, "running", False
        while state == "running":
            intake.step()
            if time.monotonic() >= next_status or delivery.complete or delivery.deserted or stop.reason:
                gone = stop.look() or delivery.deserted
                state = "complete" if delivery.complete else "stopped" if gone else "running"
                if state != "running":
                    delivery.close()  # before the last status: it counts what is still written to the cache
                status = {"state": state, "pid": os.getpid(), "rings": names, **intake.status()}
                try:
                    write_status(spec.status, status)
                    unwritten = False
                except OSError as error:  # a full disk, or one that is away: no reason to end a run
                    if not unwritten:
                        log.warning("%s cannot be written (%s); the run goes on without", spec.status, error.strerror)
                    unwritten = True
                next_status = time.monotonic() + STATUS_EVERY_S
        return state
    finally:
        intake.close()


def make_intake(spec: ReceiverSpec, config: Config, rings: Sequence[Ring]) -> Any:
    """The loop with all that it works on, from the spec: the same schedule that the ranks compute."""
    from dflash_scale.packer import RowSchedule, Samples, schedule_spec
    from dflash_scale.prompts import load_prepared  # imports datasets, seconds: after the rings are there
    from dflash_scale.quarantine import FILE_NAME, QuarantineFile
    from dflash_scale.stream.cached_delivery import make_delivery
    from dflash_scale.stream.endpoints import Endpoints
    from dflash_scale.stream.greetings import Identity
    from dflash_scale.stream.intake import Intake, limits_of
    from dflash_scale.stream.keys import receiver_keys
    from dflash_scale.stream.questions import SampleQuestions
    from dflash_scale.stream.window import Window
    from dflash_scale.verifier.identity import origin_of

    prepared = load_prepared(config.data.path)
    samples = Samples(prepared.train, prepared.validation)
    schedule = RowSchedule(samples, schedule_spec(config, spec.world_size))
    windows = [
        Window(
            ring,
            schedule.rows(rank, spec.first_step),
            samples.lengths,
            spec.layouts,
            config.stream.lookahead_rows,
        )
        for rank, ring in zip(spec.ranks, rings, strict=True)
    ]
    keys = config.stream.keys
    identity = Identity(
        spec.run_id,
        f"{spec.run_id}:{spec.ranks[0]}:{os.getpid()}",
        spec.layouts.validation,
        origin_of(config.verifier.model),
        receiver_keys(Path(keys)) if keys is not None else None,
    )
    delivery = make_delivery(config.stream, windows, samples, spec.layouts.validation)
    quarantine = QuarantineFile(Path(config.train.output_dir) / FILE_NAME, prepared.fingerprint)
    questions = SampleQuestions(samples)
    return Intake(Endpoints(config.stream), limits_of(config.stream), identity, delivery, questions, quarantine)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fills the rings of one node; started by the training process.")
    parser.add_argument("--spec", required=True, type=Path, help="JSON of a ReceiverSpec")
    spec = ReceiverSpec.parse(parser.parse_args().spec.read_text(encoding="utf-8"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s receiver %(levelname)s %(message)s", stream=sys.stderr)
    keep_freed_memory()
    stop = Stop(spec.parent_pid)
    rings: list[Ring] = []
    try:
        config = parse_config(spec.config, "the receiver's spec")
        ring_bytes = config.stream.ring_bytes + RING_SLACK
        for local in range(len(spec.ranks)):
            rings.append(Ring.create(own_ring_name(spec.run_id, local), ring_bytes))
        state = serve(spec, config, rings, stop)
        log.info(
            "all samples are delivered"
            if state == "complete"
            else f"stopped: {stop.reason or 'every rank has left its ring'}"
        )
        return 0
    except Exception:  # the edge of the process
        log.exception("the receiver cannot go on")
        return 1
    finally:
        # The rank ends us when it has all it wants, which may be now: what is done stays a success.
        signal.signal(STOP_SIGNAL, signal.SIG_IGN)
        for ring in rings:
            ring.unlink()
            ring.close()


if __name__ == "__main__":
    ended = main()
    # All is written and closed. Threads may still be in HTTP requests, and the interpreter's own end, with those and
    # with the threads of the libraries, was once seen to take half a minute.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)
