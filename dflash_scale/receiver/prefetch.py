"""What may be fetched for one rank: its next rows, as far as its look-ahead and its ring reach."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dflash_scale.data.schedule import Row
from dflash_scale.fleet.state import Key
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.ring import Ring, record_span


@dataclass(frozen=True, slots=True)
class Want:
    """A sample that may be requested now."""

    key: Key
    tokens: int
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Of hidden states."""
        return self.tokens * self.layout.bytes_per_token


class Prefetch:
    """The rows of one rank from the reader's mark on, cut down to what the ring is sure to take.

    The spans of all samples that were let through and that the reader has not released are at most the capacity less
    one largest record. A skip record at the end of the ring is smaller than the record behind it, so `reserve` finds
    room for everything that was let through, in whatever order it arrives.

    Args:
        ring: the writer's end.
        rows: the rank's rows in the order it consumes them.
        lengths: (samples,) tokens of every sample.
        layouts: what is wanted of a row's tokens.
        lookahead: rows behind the reader's mark that may be fetched.
    """

    def __init__(
        self, ring: Ring, rows: Iterator[Row], lengths: npt.NDArray[np.int32], layouts: RowLayouts, lookahead: int
    ) -> None:
        self.ring = ring
        self._rows = rows
        self._lengths = lengths
        self._layouts = layouts
        self._lookahead = lookahead
        largest = record_span(int(lengths.max()) * layouts.validation.bytes_per_token)
        if 2 * largest > ring.capacity:
            raise ValueError(
                f"the longest sample has {int(lengths.max())} tokens and takes {largest} bytes of a ring of "
                f"{ring.capacity}; raise stream.ring_bytes to at least {2 * largest}"
            )
        self._limit = ring.capacity - largest
        self._waiting: deque[Want] = deque()
        self._opened = 0  # rows
        # One row ahead, so that the end is known as soon as the last row is open: a reader that has got all may leave
        # at once, and must not look as if it had left early.
        self._next = next(self._rows, None)
        self._promised = 0  # bytes let through and not committed
        self._committed: deque[int] = deque()  # spans in the ring that the reader has not released
        self._held = 0  # their sum
        self._released = 0

    def take(self) -> list[Want]:
        """The samples that may be requested from now on, each once, in the order of the rows."""
        self._account()
        while self._next is not None and self._opened < self.ring.reader_mark + self._lookahead:
            row, self._next = self._next, next(self._rows, None)
            self._opened += 1
            layout = self._layouts.of(row)
            for place in row.places:
                self._waiting.append(Want(Key(row.epoch, place.sample), int(self._lengths[place.sample]), layout))
        taken = []
        while self._waiting:
            span = record_span(self._waiting[0].nbytes)
            if self._promised + self._held + span > self._limit:
                break
            self._promised += span
            taken.append(self._waiting.popleft())
        return taken

    def committed(self, want: Want, nbytes: int) -> None:
        """A sample that was let through is in the ring, with `nbytes` of payload (none if it is quarantined)."""
        self._promised -= record_span(want.nbytes)
        self._committed.append(record_span(nbytes))
        self._held += self._committed[-1]

    def _account(self) -> None:
        for _ in range(self.ring.released - self._released):
            self._held -= self._committed.popleft()
            self._released += 1

    @property
    def waits_for_ring(self) -> bool:
        """Whether there is a sample in reach of the look-ahead that the ring has no room for."""
        return bool(self._waiting)

    @property
    def complete(self) -> bool:
        """Whether every sample of every row is in the ring."""
        return self._next is None and not self._waiting and not self._promised

    @property
    def reader_gone(self) -> bool:
        """Whether the rank had attached and has left."""
        return self.ring.peer_attached() and not self.ring.peer_alive()
