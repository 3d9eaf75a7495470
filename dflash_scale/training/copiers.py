"""How the bytes of a record move from the ring to a row buffer: on a CPU at once, to a GPU by asynchronous copies."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dflash_scale.transport.ring import Record, Ring

log = logging.getLogger(__name__)


class Event(Protocol):
    """A point in the work of a device; a `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the device is past it."""
        ...

    def synchronize(self) -> None:
        """Returns when the device is past it."""
        ...

    def wait(self, stream: Any) -> None:
        """Lets all further work on `stream` begin behind it."""
        ...


class Copier(Protocol):
    """Moves bytes to one device. What `copy` and `zero` begin ends in the order of the calls."""

    def empty(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the device, for `copy` and `zero` to fill."""
        ...

    def enter(self) -> None:
        """To be called once by the thread that copies, before anything else of that thread."""
        ...

    def copy(self, target: Tensor, record: Record) -> Event:
        """Begins to copy the payload to `target`, (bytes of the payload,) uint8; it is read until the event."""
        ...

    def zero(self, target: Tensor) -> Event:
        """Begins to fill `target` with zeros."""
        ...

    def follow(self, event: Event) -> None:
        """Lets all further work of the training thread's stream begin behind the event."""
        ...

    def mark(self) -> Event:
        """The end of all work that the training thread's stream has by now."""
        ...

    def close(self) -> None:
        """Gives back what the copies needed; none may be under way."""
        ...


class Ended:
    """The event of work that was done when its call returned."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def wait(self, stream: Any) -> None:
        return


class HostCopier:
    """Copies to host memory before it returns."""

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def enter(self) -> None:
        return

    def copy(self, target: Tensor, record: Record) -> Event:
        target.numpy()[:] = np.frombuffer(record.payload, np.uint8)
        return Ended()

    def zero(self, target: Tensor) -> Event:
        target.zero_()
        return Ended()

    def follow(self, event: Event) -> None:
        return

    def mark(self) -> Event:
        return Ended()

    def close(self) -> None:
        return


class CudaCopier:
    """A `Copier` from one ring to one GPU, on a stream of its own.

    Args:
        ring: opened for reading. Its memory stays mapped for as long as this object lives, also if the ring is closed.
        device: the GPU that the rank trains on.
    """

    def __init__(self, ring: Ring, device: torch.device) -> None:
        self._device = device
        self._records = torch.frombuffer(ring.records(), dtype=torch.uint8)
        self.stream = torch.cuda.Stream(device)
        # CUDA keeps a refusal as its thread's last error, and torch would take it for one of the next kernel that this
        # thread launches: so it is asked in a thread that launches none.
        with ThreadPoolExecutor(1) as thread:
            refusal = thread.submit(self._lock).result()
        self.locked = refusal is None
        if refusal is not None:
            log.warning(
                "the ring of %d bytes is not page-locked, copies from it are slower: %s", ring.capacity, refusal
            )

    def _lock(self) -> str | None:
        """Locks the ring's pages; gives CUDA's reason if it does not."""
        torch.cuda.set_device(self._device)
        status = int(torch.cuda.cudart().cudaHostRegister(self._records.data_ptr(), len(self._records), 0))
        return None if status == 0 else str(torch.cuda.CudaError(status))

    def empty(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # Work on what was there before, and on what will be there once this is freed, is none of the copies'.
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        memory.record_stream(self.stream)
        return memory

    def enter(self) -> None:
        # Asked of an event, a thread without a device would make a context on GPU 0.
        torch.cuda.set_device(self._device)

    def copy(self, target: Tensor, record: Record) -> Event:
        source = self._records[record.offset : record.offset + len(record.payload)]
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=self.locked)
        return self._event(self.stream)

    def zero(self, target: Tensor) -> Event:
        with torch.cuda.stream(self.stream):
            target.zero_()
        return self._event(self.stream)

    def follow(self, event: Event) -> None:
        event.wait(torch.cuda.current_stream(self._device))

    def mark(self) -> Event:
        return self._event(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Unlocks the pages, before they may be unmapped.

        Raises:
            RuntimeError: a copy failed, or CUDA does not unlock them.
        """
        try:
            self.stream.synchronize()
        finally:
            if self.locked:
                self.locked = False
                status = int(torch.cuda.cudart().cudaHostUnregister(self._records.data_ptr()))
                if status != 0:
                    raise torch.cuda.CudaError(status)

    @staticmethod
    def _event(stream: torch.cuda.Stream) -> Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event
