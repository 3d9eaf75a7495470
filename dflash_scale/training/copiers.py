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


class DeviceEvent(Protocol):
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

    def copy(self, target: Tensor, record: Record) -> DeviceEvent:
        """Begins to copy the payload to `target`, (bytes of the payload,) uint8; it is read until the event."""
        ...

    def zero(self, target: Tensor) -> DeviceEvent:
        """Begins to fill `target` with zeros."""
        ...

    def follow(self, event: DeviceEvent) -> None:
        """Lets all further work of the training thread's stream begin behind the event."""
        ...

    def mark(self) -> DeviceEvent:
        """The end of all work that the training thread's stream has by now."""
        ...

    def close(self) -> None:
        """Gives back what the copies needed; none may be under way."""
        ...


class CompletedEvent:
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

    def copy(self, target: Tensor, record: Record) -> DeviceEvent:
        target.numpy()[:] = np.frombuffer(record.payload, np.uint8)
        return CompletedEvent()

    def zero(self, target: Tensor) -> DeviceEvent:
        target.zero_()
        return CompletedEvent()

    def follow(self, event: DeviceEvent) -> None:
        return

    def mark(self) -> DeviceEvent:
        return CompletedEvent()

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
        # A failed cudaHostRegister stays as the last error of its thread, and torch would report it for the next kernel
        # launched there: so the pages are locked in a throw-away thread.
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
        # Our copies must not overtake work that still uses this block's previous owner, and the caching allocator must
        # not give the block away while our stream copies into it.
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        memory.record_stream(self.stream)
        return memory

    def enter(self) -> None:
        # A thread that never set a device makes a context on GPU 0 when it queries an event.
        torch.cuda.set_device(self._device)

    def copy(self, target: Tensor, record: Record) -> DeviceEvent:
        source = self._records[record.offset : record.offset + len(record.payload)]
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=self.locked)
        return self._event(self.stream)

    def zero(self, target: Tensor) -> DeviceEvent:
        with torch.cuda.stream(self.stream):
            target.zero_()
        return self._event(self.stream)

    def follow(self, event: DeviceEvent) -> None:
        event.wait(torch.cuda.current_stream(self._device))

    def mark(self) -> DeviceEvent:
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
    def _event(stream: torch.cuda.Stream) -> DeviceEvent:
        event = torch.cuda.Event()
        event.record(stream)
        return event
