"""A stand-in for a GPU's copy stream: what is begun ends later, and touches its bytes only then.

So a record that is released before its copy has ended, a row that is read before it is filled, and a buffer that is
filled while it is in use show as wrong bytes. Beyond what a stream does, single copies can be ended out of their order.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dflash_scale.training.copiers import DeviceEvent
from dflash_scale.transport.ring import Record


@dataclass(eq=False)
class LateEvent:
    end_up_to: Callable[[LateEvent], None]
    ended: bool = False

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        self.end_up_to(self)

    def wait(self, stream: Any) -> None:
        raise AssertionError("a stream waits through the copier that knows it")


@dataclass
class LateCopier:
    """Ends nothing by itself; a test does, and whoever waits for an event."""

    begun: list[tuple[LateEvent, Callable[[], object]]] = field(default_factory=list)
    uses: list[LateEvent] = field(default_factory=list)
    closed_with: list[int] = field(default_factory=list)  # at each `close`, the copies that were under way
    lock: threading.RLock = field(default_factory=threading.RLock)

    def empty(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN, in all dtypes

    def enter(self) -> None:
        return

    def copy(self, target: Tensor, record: Record) -> LateEvent:
        return self._begin(lambda: target.copy_(torch.from_numpy(np.frombuffer(record.payload, np.uint8).copy())))

    def zero(self, target: Tensor) -> LateEvent:
        return self._begin(target.zero_)

    def _begin(self, work: Callable[[], object]) -> LateEvent:
        event = LateEvent(self._end_up_to)
        with self.lock:
            self.begun.append((event, work))
        return event

    def follow(self, event: DeviceEvent) -> None:
        event.synchronize()  # the test reads at once what a stream would read later

    def mark(self) -> LateEvent:
        with self.lock:
            self.uses.append(LateEvent(self._end_up_to))
            return self.uses[-1]

    def close(self) -> None:
        self.closed_with.append(len(self.begun))

    def end(self, index: int = 0) -> None:
        """Ends the copy that is `index`th of those under way."""
        with self.lock:
            event, work = self.begun.pop(index)
            work()
            event.ended = True

    def end_use(self) -> None:
        with self.lock:
            self.uses.pop(0).ended = True

    def _end_up_to(self, event: LateEvent) -> None:
        with self.lock:
            while not event.ended:
                self.end()


class AtRandom(LateCopier):
    """Ends copies and uses from a thread of its own, at random times, until it is closed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.closed_with:
            with self.lock:
                if self.begun and self._draw.random() < 0.5:
                    self.end()
                if self.uses and self._draw.random() < 0.2:
                    self.end_use()
            time.sleep(0.0005)
