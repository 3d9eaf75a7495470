"""Host memory of one fixed size, lent out in contiguous pieces: what hidden states wait in until they are sent.

One slab is taken at the start, because taking pinned memory (cudaHostAlloc) is slow and waits for the GPU. Pieces are
lent first fit from the low end, and neighbours that come back are joined, so that free memory splits only around what
is still lent. Imported inside the vLLM server: torch and the standard library only.
"""

import bisect
import threading
from dataclasses import dataclass
from typing import Final

import torch

ALIGNMENT: Final = 256  # bytes: what a copy engine and a vectorised copy like


@dataclass(frozen=True, slots=True)
class Piece:
    """`memory` (nbytes,) uint8 is the borrower's until it gives the piece back."""

    start: int
    memory: torch.Tensor


class HostPool:
    """`nbytes` of host memory, pinned for copies from a GPU if `pinned`. Any thread may take and give back."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        if nbytes < 1:
            raise ValueError(f"a pool needs at least one byte, got {nbytes}")
        self._slab = torch.empty(
            nbytes, dtype=torch.uint8, pin_memory=pinned
        )  # a CPU's pages come with their first use
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (start, stop), ascending, never touching each other

    @property
    def nbytes(self) -> int:
        return self._slab.numel()

    def take(self, nbytes: int) -> Piece | None:
        """A piece of `nbytes`, None while no free one is that long. Raises ValueError if none ever will be."""
        if not 1 <= nbytes <= self.nbytes:
            raise ValueError(f"the pool has {self.nbytes} bytes, asked for {nbytes}")
        with self._lock:
            for i, (start, stop) in enumerate(self._free):
                if stop - start >= nbytes:
                    used = min(start + _aligned(nbytes), stop)
                    self._free[i : i + 1] = [(used, stop)] if used < stop else []
                    return Piece(start, self._slab[start : start + nbytes])
        return None

    def give_back(self, piece: Piece) -> None:
        """Ends the loan of a piece that this pool lent. Raises ValueError if (a part of) it is not lent."""
        start, stop = piece.start, min(piece.start + _aligned(piece.memory.numel()), self.nbytes)
        with self._lock:
            i = bisect.bisect_left(self._free, (start, 0))
            if (i > 0 and self._free[i - 1][1] > start) or (i < len(self._free) and self._free[i][0] < stop):
                raise ValueError(f"the bytes {start} to {stop} of the pool were given back already")
            first = last = i
            if i > 0 and self._free[i - 1][1] == start:
                first, start = i - 1, self._free[i - 1][0]
            if i < len(self._free) and self._free[i][0] == stop:
                last, stop = i + 1, self._free[i][1]
            self._free[first:last] = [(start, stop)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
