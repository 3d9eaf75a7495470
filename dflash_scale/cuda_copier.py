"""Copies from the ring's own memory to a GPU: no host memory lies between, and training does not wait for them.

The rank locks the pages of its ring once, so that the GPU reads them by itself while the processor goes on. Where CUDA
refuses that, the log says why, once, and each copy goes through buffers of CUDA's driver and ends before it returns.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dflash_scale.row_memory import Event
from dflash_scale.transport.ring import Record, Ring

log = logging.getLogger(__name__)


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
