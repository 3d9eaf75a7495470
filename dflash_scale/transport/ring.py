"""The Python face of the shared-memory ring (csrc/ring): records from one receiver process to one training rank.

Channel: the writer makes the segment, one reader opens it, the writer unlinks the name once every reader is attached,
so that nothing stays in /dev/shm however the processes end; `reclaim()` covers a death before that.
Ordering: records come out in the order of their commits. Loss: none while both live; a record that was reserved but not
committed never existed. Back-pressure: `reserve()` gives None when the ring is full. Who may die: either side; the
other sees it through `peer_alive()` (pid and start time), and a reader still gets all that was committed before. Who
may hang: the reader alone; a writer's loop has to `beat()`. A reader may hold any number of records and releases them
in the order in which it read them. Its place is free once it has closed or died; the next one begins with the first
record that was not released.

An object may be used by one thread at a time.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Final

from dflash_scale import _ring

COMMITTED: Final = 0  # the payload is complete and verified
QUARANTINED: Final = 1  # no payload: the sample failed everywhere and is to be trained without
LINE: Final = 64  # bytes; alignment of records and payloads
SHORTEST_WAIT_S: Final = 20e-6
LONGEST_WAIT_S: Final = 2e-3
# How long a reader waits for a writer that does not beat. A file server that fails over stops the receiver's loop for a
# minute or two; torch.distributed, whose error says less, gives up after ten or more.
SILENCE_S: Final = 300.0
# Before the first beat: the receiver makes its other rings, reads the data set and counts the files of the cache.
START_SILENCE_S: Final = 1800.0


class PeerDied(RuntimeError):
    """The other side of the ring is gone."""


class PeerStuck(RuntimeError):
    """The writer of the ring runs and does nothing."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as it lies in the ring; `payload` (bytes, read-only) is valid until the record is released."""

    sample: int
    epoch: int
    status: int  # COMMITTED or QUARANTINED
    tokens: int
    payload: memoryview
    offset: int  # bytes, of the payload in `Ring.records()`


def ring_name(run_id: str, owner_pid: int, local_rank: int) -> str:
    """The segment's name; it carries the owner's pid and start time, so that no two owners ever have the same.

    Raises:
        ProcessLookupError: no such process.
    """
    start = _ring.process_start(owner_pid)
    if start is None:
        raise ProcessLookupError(f"process {owner_pid}, the owner of the rings of run {run_id}, is not running")
    return f"/dflash-{run_id}-{owner_pid}-{start}-{local_rank}"


def process_start(pid: int) -> int | None:
    """Start time of a running process in clock ticks since boot; None when there is none (a zombie is none)."""
    return _ring.process_start(pid)


def record_span(payload_bytes: int) -> int:
    """Bytes of a ring's capacity that a record of `payload_bytes` takes."""
    return _ring.record_span(payload_bytes)


def reclaim(prefix: str = "dflash-") -> list[str]:
    """Unlinks the segments that no living process owns; gives their names.

    The owner holds a lock on its segment that only its death or its `close()` takes away, so neither a pid that is used
    again nor a pid namespace of its own misleads this. A child that the owner forked without exec shares the lock.
    """
    return _ring.reclaim(prefix)


class Ring:
    """One end of a ring. Methods of the other end raise ValueError, and so does everything after `close()`."""

    def __init__(self, native: _ring.Ring) -> None:
        self._native = native
        self._beat = 0  # the writer's last one that this side has seen
        self._silence_s = 0.0  # that this side has waited since

    @classmethod
    def create(cls, name: str, capacity: int) -> Ring:
        """Makes the segment, all of its pages included. `capacity` in bytes, rounded down to a multiple of 64.

        Raises:
            ValueError: the name or the capacity is not possible.
            OSError: /dev/shm is too small (ENOSPC), the process may not make such a file (EFBIG), or the name exists.
        """
        return cls(_ring.Ring.create(name, capacity // LINE * LINE))

    @classmethod
    def open(cls, name: str, timeout: float = 0.0) -> Ring:
        """Attaches as the reader; waits up to `timeout` seconds for a segment that is not made yet.

        Raises:
            FileNotFoundError: there is no such segment.
            ValueError: it is not a ring of this version, or it has a living reader.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                return cls(_ring.Ring.open(name))
            except FileNotFoundError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.01)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The writer's side.

    def reserve(self, nbytes: int) -> memoryview | None:
        """A writable view of `nbytes` in the ring, to be filled in place; None while the ring is too full.

        Raises:
            ValueError: `record_span(nbytes)` is more than half of the capacity, for which there may never be room.
        """
        return self._native.reserve(nbytes)

    def commit(self, *, sample: int, epoch: int, status: int, tokens: int) -> None:
        """Publishes the reserved bytes."""
        self._native.commit(sample, epoch, status, tokens)

    def abandon(self) -> None:
        """Gives the reserved bytes back; the reader never sees them."""
        self._native.abandon()

    def beat(self) -> None:
        """Tells the reader that the writer's loop moves; much more often than every SILENCE_S."""
        self._native.beat()

    # The reader's side.

    def read(self) -> Record | None:
        """The record behind the last one read, or None."""
        found = self._native.read()
        return None if found is None else Record(*found)

    def release(self) -> None:
        """Gives the bytes of the oldest record that was read back to the writer; nothing may still be reading them."""
        self._native.release()

    def records(self) -> memoryview:
        """The memory that all payloads lie in, mapped for as long as the view is held.

        Page-aligned, and writable because CUDA locks only such pages everywhere; a reader writes nothing there.
        """
        return self._native.records()

    def next_record(self, timeout: float) -> Record | None:
        """`read`, but waits up to `timeout` seconds for a record; None when none came.

        Raises:
            PeerDied: the writer is gone and all that it committed has been read.
            PeerStuck: the writer has not beaten for SILENCE_S of such waiting.
        """
        deadline = time.monotonic() + timeout
        wait = SHORTEST_WAIT_S
        while (record := self.read()) is None:
            if not self.peer_alive():
                record = self.read()  # it may have committed just before it went
                if record is not None:
                    return record
                raise PeerDied(
                    f"the receiver (pid {self.peer_pid}) that fills ring {self.name} is gone after "
                    f"{self.released} records; its own message on stderr says why, and where there is none it was "
                    "killed, by the kernel if memory ran out"
                )
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(wait, left))
            self._listen(min(wait, left))
            wait = min(2 * wait, LONGEST_WAIT_S)
        return record

    def _listen(self, waited_s: float) -> None:
        """Adds a wait to the writer's silence, or ends that. Not the clock's: that goes on while both are stopped."""
        beat = self._native.writer_beat
        if beat != self._beat:
            self._beat, self._silence_s = beat, 0.0
            return
        self._silence_s += waited_s
        if self._silence_s >= (SILENCE_S if beat else START_SILENCE_S):
            raise PeerStuck(
                f"the receiver (pid {self.peer_pid}) that fills ring {self.name} runs, but its loop has not moved for "
                f"{self._silence_s:.0f} s, after {self.released} records: it was stopped, or a file system that it "
                "uses hangs (stream.cache, data.path, train.output_dir); mend that and continue with --resume"
            )

    @property
    def reader_mark(self) -> int:
        """The row from which on the writer may fetch, its look-ahead further; rows before it may still be in use."""
        return self._native.reader_mark

    @reader_mark.setter
    def reader_mark(self, mark: int) -> None:
        self._native.reader_mark = mark

    # Both sides.

    @property
    def name(self) -> str:
        return self._native.name

    @property
    def capacity(self) -> int:
        return self._native.capacity

    @property
    def released(self) -> int:
        """Records given back so far; one less if a reader died inside of `release()`."""
        return self._native.released

    @property
    def peer_pid(self) -> int:
        """Pid of the other side, 0 before it attached."""
        return self._native.peer_pid()

    def peer_attached(self) -> bool:
        """Whether the other side ever attached."""
        return self._native.peer_attached()

    def peer_alive(self) -> bool:
        """Whether the other side has attached, runs, and has not closed."""
        return self._native.peer_alive()

    def close(self) -> None:
        """Marks this side as closed and drops the mapping; views given out before stay readable."""
        self._native.close()

    def unlink(self) -> None:
        """Removes the name; both sides keep what they have mapped."""
        self._native.unlink()


def own_ring_name(run_id: str, local_rank: int) -> str:
    """`ring_name` of a ring that this process owns."""
    return ring_name(run_id, os.getpid(), local_rank)
