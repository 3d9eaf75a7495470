"""Writes samples to the cache in a thread of its own, so that a disk never holds the stream up.

What waits to be written is bounded in bytes. Whoever offers a sample while the queue is full learns so at once. The
first error, of the file system as a rule, ends the writing for good: it is said once, with figures, and the owner goes
on without.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dflash_scale.cache.folder import Cache
from dflash_scale.transport.layout import Buffer, Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """What is to be written: see `Cache.write`. Nobody else may change `states` any more."""

    sample: int
    token_ids: bytes
    layout: Layout
    states: Buffer


class CacheWriter:
    """The writing thread of a cache.

    Args:
        cache: where to.
        queue_bytes: of states that may wait; one sample may always wait.
        most_bytes: of the whole folder; None = no bound.
        report: called from the thread with each sample's number and, if it could not be written, why.
    """

    def __init__(
        self,
        cache: Cache,
        queue_bytes: int,
        most_bytes: int | None = None,
        report: Callable[[int, str], None] = lambda sample, problem: None,
    ) -> None:
        self._cache = cache
        self._queue_bytes = queue_bytes
        self._most_bytes = most_bytes
        self._report = report
        self.stopped = ""  # why nothing is written any more
        self.counts: Counter[str] = Counter()  # written, written_bytes, not_kept
        self._folder_bytes = cache.size()[1] if most_bytes is not None else 0
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Sample | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="cache-writer", daemon=True)
        self._thread.start()

    def fits(self, nbytes: int) -> bool:
        """Whether a sample of this size would be taken now; counts it as not kept if not."""
        with self._lock:
            full = self._most_bytes is not None and self._folder_bytes + self._waiting_bytes + nbytes > self._most_bytes
            busy = self._waiting_bytes > 0 and self._waiting_bytes + nbytes > self._queue_bytes
            taken = not (self.stopped or full or busy)
            self.counts["not_kept"] += not taken
        return taken

    def put(self, sample: Sample) -> None:
        """Queues a sample that `fits`."""
        with self._lock:
            self._waiting_bytes += len(sample.states)
        self._queue.put(sample)

    def close(self) -> None:
        """Writes what waits, and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def status(self) -> dict[str, Any]:
        with self._lock:
            names = ("written", "written_bytes", "not_kept")
            return {**{name: self.counts[name] for name in names}, "stopped": self.stopped}

    def _work(self) -> None:
        while (sample := self._queue.get()) is not None:
            problem, size = self.stopped, 0
            try:
                if not problem:
                    size = self._cache.write(sample.sample, sample.token_ids, sample.layout, sample.states)
            except Exception as error:  # noqa: BLE001 - the edge of the thread: somebody waits for its report
                problem = self._stop(error)
            with self._lock:
                self._waiting_bytes -= len(sample.states)
                self._folder_bytes += size
                self.counts["written"] += not problem
                self.counts["written_bytes"] += size
                self.counts["not_kept"] += bool(problem)
            self._report(sample.sample, problem)

    def _stop(self, error: Exception) -> str:
        folder = self._cache.folder
        try:
            room = f"{shutil.disk_usage(folder).free:,} bytes free"
        except OSError:
            room = "which is gone"
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        self.stopped = f"{reason} ({folder}, {room})"
        log.warning(
            "stream.cache: %s; %d samples of %d bytes were written by this process, nothing is written any more",
            self.stopped,
            self.counts["written"],
            self.counts["written_bytes"],
        )
        return self.stopped
