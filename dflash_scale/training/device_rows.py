"""Row buffers on the training device, filled from a ring by asynchronous copies.

A record stays in the ring until its copy has ended: records are released in their order, and a late copy holds back the
releases behind it, but no other copy. Training waits, on its stream, for the copies of the row that it takes. A buffer
is filled again when all work on what it held has ended.

How bytes move is a `Copier`'s: `HostCopier` for training on a CPU, `CudaCopier` for a GPU (copiers.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from dflash_scale.training.copiers import Copier, DeviceEvent
from dflash_scale.transport.ring import QUARANTINED, Record, Ring

READY_AND_IN_USE: Final = 2  # buffers of rows: one is ready, one in use


@dataclass(slots=True, eq=False)
class RowBuffer:
    """Memory of one row: `bytes` (row_bytes,) uint8 on the device."""

    bytes: Tensor
    filled: DeviceEvent | None = None  # the last copy into it
    used: DeviceEvent | None = None  # the last use of what it held before


class DeviceRows:
    """`rows` buffers of `row_bytes` each, which with its ring hold all hidden states of one rank.

    One thread reads the ring and fills: `take`, `fill`, `release_copied`. Another one trains: `hand_over`, `give_back`.
    `close` is for when the first has ended.
    """

    def __init__(self, ring: Ring, copier: Copier, *, rows: int, row_bytes: int) -> None:
        self._ring, self._copier = ring, copier
        self._free = deque(RowBuffer(copier.empty(row_bytes)) for _ in range(rows))
        self._copying: deque[DeviceEvent] = deque()  # one for each record that was read and is not released

    def enter(self) -> None:
        """To be called by the thread that fills, first of all."""
        self._copier.enter()

    def take(self) -> RowBuffer | None:
        """A buffer to fill; None while each holds a row that is not trained yet, or that the device still works on."""
        if not self._free:
            return None
        used = self._free[0].used
        if used is not None and not used.query():
            return None
        return self._free.popleft()

    def fill(self, buffer: RowBuffer, begin: int, end: int, record: Record) -> None:
        """Begins to put the ring's last record at bytes [begin, end) of the buffer; zeros if it is quarantined.

        Raises:
            RuntimeError: the payload has another size.
        """
        target = buffer.bytes[begin:end]
        if record.status == QUARANTINED:
            buffer.filled = self._copier.zero(target)  # not stale values: a NaN there would reach the gradient of fc
        elif len(record.payload) != end - begin:
            raise RuntimeError(f"sample {record.sample}: got {len(record.payload)} bytes, wanted {end - begin}")
        else:
            buffer.filled = self._copier.copy(target, record)
        self._copying.append(buffer.filled)

    @property
    def copying(self) -> bool:
        """Whether there are records that wait for the end of their copies."""
        return bool(self._copying)

    def release_copied(self, *, wait: bool = False) -> None:
        """Releases the oldest records up to the first whose copy has not ended; with `wait`, all of them."""
        while self._copying and (wait or self._copying[0].query()):
            self._copying[0].synchronize()
            self._ring.release()
            self._copying.popleft()

    def hand_over(self, buffer: RowBuffer, nbytes: int) -> Tensor:
        """(nbytes,) uint8, the first of the buffer, for the training thread's stream until `give_back`."""
        if buffer.filled is not None:
            self._copier.follow(buffer.filled)
        return buffer.bytes[:nbytes]

    def give_back(self, buffer: RowBuffer) -> None:
        """The training thread begins nothing more that uses the buffer."""
        buffer.used = self._copier.mark()
        self._free.append(buffer)

    def close(self) -> None:
        """Waits for the copies that are under way."""
        try:
            self.release_copied(wait=True)
        finally:
            self._copier.close()
