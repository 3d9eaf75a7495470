"""The receiver's process, which fills the rings of a node's ranks.

    python -m dflash_scale.receiver.process SPEC

The first rank of a node starts it (`client.Stream.start`) and it ends with that rank: on SIGUSR1, when the rank dies
(the kernel's parent-death signal, and a check of the parent's pid once a second), or when every sample is delivered.
When it fails, its traceback is on stderr, its exit status is not 0, and every rank sees a dead writer in its ring;
when it hangs, every rank sees one that does not beat.

Once a second it writes its status file (`status.py`) for progress and reports.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dflash_scale.config.stream import StreamSection
from dflash_scale.data.dataset import Samples
from dflash_scale.data.quarantine import QuarantineFile
from dflash_scale.data.schedule import RowSchedule, schedule_spec
from dflash_scale.fleet.state import Limits
from dflash_scale.receiver.cached_sink import CachedSink, make_sink
from dflash_scale.receiver.client import STOP_SIGNAL, ReceiverSpec
from dflash_scale.receiver.connections import Identity
from dflash_scale.receiver.endpoints import Endpoints
from dflash_scale.receiver.loop import ReceiverLoop
from dflash_scale.receiver.prefetch import Prefetch
from dflash_scale.receiver.requests import SampleRequests
from dflash_scale.receiver.ring_sink import RingSink
from dflash_scale.receiver.status import Status
from dflash_scale.transport.keys import receiver_keys
from dflash_scale.transport.ring import Ring, own_ring_name
from dflash_scale.verifier.identity import origin_of

log = logging.getLogger(__name__)

STATUS_EVERY_S: Final = 1.0
RING_SLACK: Final = 4096  # bytes: record headers, so that two samples of half of stream.ring_bytes fit
PR_SET_PDEATHSIG: Final = 1  # prctl(2)
# mallopt(3) of glibc
M_TRIM_THRESHOLD: Final = -1
M_MMAP_MAX: Final = -4
M_ARENA_MAX: Final = -8


def keep_freed_memory() -> None:
    """Makes this process use the memory of freed messages again, instead of giving it back.

    ZeroMQ allocates every message anew, and glibc maps what is large, so that the kernel has to clear each page of each
    message: about a quarter of the time of a transfer. Call it before any thread runs. The process keeps its peak,
    which the credit bounds.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
    libc.mallopt(M_ARENA_MAX, 1)  # other arenas than the first are too small for large messages


def limits_of(stream: StreamSection) -> Limits:
    """The bounds of asking the servers."""
    return Limits(**{name: getattr(stream, name) for name in Limits.__dataclass_fields__})


class Stop:
    """Whether it is time to go: a signal came, or the parent is gone.

    Not by server/process.py, which a receiver may not import, and whose signal would be SIGTERM (see `STOP_SIGNAL`).
    """

    def __init__(self, parent_pid: int) -> None:
        self.reason = ""
        self._parent_pid = parent_pid
        signal.signal(STOP_SIGNAL, self._signalled)
        for ours in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ours, signal.SIG_IGN)
        # The kernel signals when the parent's thread ends; the check of the pid is for a parent that was gone already.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, STOP_SIGNAL, 0, 0, 0)

    def _signalled(self, number: int, frame: object) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def poll(self) -> bool:
        if not self.reason and os.getppid() != self._parent_pid:
            self.reason = f"the training process {self._parent_pid} is gone"
        return bool(self.reason)


class StatusFile:
    """Writes the status; one that cannot be written (a full disk, or one that is away) is no reason to end a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed = False  # the last time

    def write(self, status: Status) -> None:
        try:
            status.write(self._path)
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written (%s); the run goes on without", self._path, error.strerror)
            self._failed = True
        else:
            self._failed = False


def fill_rings(spec: ReceiverSpec, rings: Sequence[Ring], stop: Stop) -> Status:
    """Feeds the rings until everything is delivered or `stop` says so. Returns the last status."""
    status = Status("starting", os.getpid(), [ring.name for ring in rings])
    status.write(spec.status)  # other ranks find their rings by it
    file = StatusFile(spec.status)
    loop, sink = make_loop(spec, rings)
    status.state, next_status = "running", 0.0
    try:
        while status.state == "running":
            loop.step()
            if time.monotonic() >= next_status or sink.complete or sink.deserted or stop.reason:
                gone = stop.poll() or sink.deserted
                status.state = "complete" if sink.complete else "stopped" if gone else "running"
                if status.state != "running":
                    sink.close()  # before the last status: it counts what is still written to the cache
                loop.report(status)
                sink.report(status)
                file.write(status)
                next_status = time.monotonic() + STATUS_EVERY_S
        return status
    finally:
        loop.close()


def make_loop(spec: ReceiverSpec, rings: Sequence[Ring]) -> tuple[ReceiverLoop, RingSink | CachedSink]:
    """The loop and where it delivers, from the spec: the same schedule that the ranks compute."""
    from dflash_scale.data.dataset import load_prepared

    config, layouts = spec.config, spec.layouts
    prepared = load_prepared(config.data.folder)
    samples = Samples(prepared.train, prepared.validation)
    schedule = RowSchedule(samples, schedule_spec(config, spec.world_size))
    lookahead = config.stream.lookahead_rows
    prefetches = [
        Prefetch(ring, schedule.rows(rank, spec.first_step), samples.lengths, layouts, lookahead)
        for rank, ring in zip(spec.ranks, rings, strict=True)
    ]
    keys = config.stream.keys
    identity = Identity(
        run_id=spec.run_id,
        receiver=f"{spec.run_id}:{spec.ranks[0]}:{os.getpid()}",
        layout=layouts.validation,
        origin=origin_of(config.verifier.model),
        keys=receiver_keys(Path(keys)) if keys is not None else None,
    )
    sink = make_sink(config.stream, prefetches, samples, layouts.validation)
    quarantine = QuarantineFile(config.train.quarantine_file, prepared.fingerprint)
    requests = SampleRequests(samples)
    loop = ReceiverLoop(Endpoints(config.stream), limits_of(config.stream), identity, sink, requests, quarantine)
    return loop, sink


def main() -> int:
    """Started by `client.spawn_receiver`, with the file of its spec."""
    spec = ReceiverSpec.parse(Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s receiver %(levelname)s %(message)s", stream=sys.stderr)
    keep_freed_memory()
    stop = Stop(spec.parent_pid)
    rings: list[Ring] = []
    try:
        ring_bytes = spec.config.stream.ring_bytes + RING_SLACK
        for local in range(len(spec.ranks)):
            rings.append(Ring.create(own_ring_name(spec.run_id, local), ring_bytes))
        status = fill_rings(spec, rings, stop)
        if status.state == "complete":
            log.info("all samples are delivered")
        else:
            log.info("stopped: %s", stop.reason or "every rank has left its ring")
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
    # All is written and closed. The interpreter's own end, with the threads of the libraries, was once seen to take
    # half a minute.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)
