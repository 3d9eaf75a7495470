"""The sink of a training run: what the ranks want now, and the way of a sample into the ring of its rank."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from dflash_scale.fleet.state import Key
from dflash_scale.receiver.prefetch import Prefetch, Want
from dflash_scale.receiver.status import QuarantinedSample, Status
from dflash_scale.transport.ring import COMMITTED, QUARANTINED

QUARANTINED_KEPT: Final = 1000  # named in the status; all are counted


class RingSink:
    """Fills the rings of one node's ranks, one `Prefetch` each. A `Sink`, and when there is an end to it."""

    def __init__(self, prefetches: Sequence[Prefetch]) -> None:
        self._prefetches = list(prefetches)
        self._wanted: dict[Key, tuple[Want, Prefetch]] = {}
        self.attached = False  # whether every rank has opened its ring
        self.counts: Counter[str] = Counter()  # committed, committed_bytes, quarantined
        self.quarantined: list[QuarantinedSample] = []

    @property
    def complete(self) -> bool:
        """Whether every sample of the schedule is in its ring."""
        return self.attached and all(prefetch.complete for prefetch in self._prefetches)

    @property
    def deserted(self) -> bool:
        """Whether nothing is left to do because ranks have left their rings."""
        return self.attached and all(prefetch.complete or prefetch.reader_gone for prefetch in self._prefetches)

    @property
    def backlog(self) -> bool:
        return False

    @property
    def blocked_on(self) -> str:
        """What more samples wait for: "ring" if one that is due finds no room, else the "trainer"."""
        return "ring" if any(prefetch.waits_for_ring for prefetch in self._prefetches) else "trainer"

    def report(self, status: Status) -> None:
        """Writes what became of the samples into `status`."""
        status.committed = self.counts["committed"]
        status.committed_bytes = self.counts["committed_bytes"]
        status.quarantined = self.counts["quarantined"]
        status.quarantined_samples = list(self.quarantined)

    def close(self) -> None:
        """Nothing to finish: the rings are closed by their owner."""

    def take(self) -> list[Want]:
        """The samples that are due. Call it every few milliseconds: it keeps the rings alive."""
        taken = []
        for prefetch in self._prefetches:
            prefetch.ring.beat()
            if prefetch.reader_gone:
                continue
            for want in prefetch.take():
                self._wanted[want.key] = (want, prefetch)
                taken.append(want)
        if not self.attached and all(prefetch.ring.peer_attached() for prefetch in self._prefetches):
            self.attached = True
            for prefetch in self._prefetches:  # both sides have it mapped; without a name nothing can be left behind
                prefetch.ring.unlink()
        return taken

    def want(self, key: Key) -> Want:
        return self._wanted[key][0]

    def reserve(self, key: Key) -> memoryview | None:
        """A slot of the rank's ring; None when the rank has left."""
        want, prefetch = self._wanted[key]
        slot = _reserve(prefetch, want.nbytes)
        if slot is None:
            del self._wanted[key]
        return slot

    def abandon(self, key: Key) -> None:
        self._wanted[key][1].ring.abandon()

    def commit(self, key: Key, token_ids: bytes, states: memoryview) -> None:
        want, prefetch = self._wanted.pop(key)
        prefetch.ring.commit(sample=key.sample, epoch=key.epoch, status=COMMITTED, tokens=want.tokens)
        prefetch.committed(want, want.nbytes)
        self.counts["committed"] += 1
        self.counts["committed_bytes"] += want.nbytes

    def quarantine(self, key: Key, reason: str) -> None:
        """The rank gets a record without payload instead of the sample."""
        want, prefetch = self._wanted.pop(key)
        if _reserve(prefetch, 0) is None:
            return
        prefetch.ring.commit(sample=key.sample, epoch=key.epoch, status=QUARANTINED, tokens=0)
        prefetch.committed(want, 0)
        self.counts["quarantined"] += 1
        if len(self.quarantined) < QUARANTINED_KEPT:
            self.quarantined.append(QuarantinedSample(key.epoch, key.sample, reason))


def _reserve(prefetch: Prefetch, nbytes: int) -> memoryview | None:
    """A slot; `Prefetch` keeps room for it. None when nobody reads this ring any more."""
    while (slot := prefetch.ring.reserve(nbytes)) is None:
        if prefetch.reader_gone:
            return None
        time.sleep(0.001)
    return slot
