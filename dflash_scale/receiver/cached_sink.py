"""The sink of a training run with a cache: it looks there before a server is asked, and may keep what servers sent.

Files are read by the receiver's own loop, straight into the slot, one sample a turn so that messages of servers are
never kept waiting for long: there is one writer to a ring, and a copy out of a reading thread costs more than it saves.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dflash_scale.cache.file import BadFile
from dflash_scale.cache.folder import Cache, open_cache
from dflash_scale.cache.writer import CacheWriter, Sample
from dflash_scale.config.stream import StreamSection
from dflash_scale.data.dataset import Samples
from dflash_scale.fleet.state import Key
from dflash_scale.receiver.prefetch import Prefetch, Want
from dflash_scale.receiver.ring_sink import RingSink
from dflash_scale.receiver.status import CacheStatus, Status
from dflash_scale.transport.layout import Layout

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW: Final = 64  # samples that an offline run cannot find; more of them are no accident
WRITE_QUEUE_BYTES: Final = 256 << 20  # that may wait to be written


def make_sink(
    stream: StreamSection, prefetches: Sequence[Prefetch], samples: Samples, layout: Layout
) -> RingSink | CachedSink:
    """The way into the rings, past the cache if the run has one. `layout`: all that the run's rows may want."""
    rings = RingSink(prefetches)
    if stream.cache is None:
        return rings
    cache = open_cache(Path(stream.cache), layout)
    files, nbytes = cache.size()
    log.info("cache %s: %d files for %d samples, %.1f GB", cache.folder, files, len(samples.lengths), nbytes / 1e9)
    keeps = stream.mode == "hybrid" and stream.keep
    writer = CacheWriter(cache, WRITE_QUEUE_BYTES, stream.cache_bytes) if keeps else None
    return CachedSink(rings, samples, cache, offline=stream.mode == "offline", writer=writer)


class CacheLacking(RuntimeError):
    """An offline run finds sample after sample missing or damaged."""


class CachedSink:
    """A `Sink` before the rings: what the cache has goes into them here, and `take` gives what it lacks.

    Args:
        rings: where all samples go.
        samples: the data set, for the token ids.
        cache: where to look.
        offline: whether a sample that the cache lacks is quarantined, because there is no server to ask.
        writer: writes what servers sent; None: nothing is written.
    """

    def __init__(
        self, rings: RingSink, samples: Samples, cache: Cache, *, offline: bool, writer: CacheWriter | None
    ) -> None:
        self._rings = rings
        self._samples = samples
        self._cache = cache
        self._offline = offline
        self._writer = writer
        self._due: deque[Want] = deque()  # to be read
        self._lacking_in_a_row = 0
        self._cache_counts: Counter[str] = Counter()  # hits, misses, corrupt

    @property
    def attached(self) -> bool:
        return self._rings.attached

    @property
    def complete(self) -> bool:
        return self._rings.complete

    @property
    def deserted(self) -> bool:
        return self._rings.deserted

    @property
    def backlog(self) -> bool:
        return bool(self._due)

    @property
    def blocked_on(self) -> str:
        return "cache" if self._due else self._rings.blocked_on

    def report(self, status: Status) -> None:
        self._rings.report(status)
        counts, written = self._cache_counts, self._writer.status() if self._writer is not None else {}
        status.cache = CacheStatus(counts["hits"], counts["misses"], counts["corrupt"], **written)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def take(self) -> list[Want]:
        """The samples that are due and not in the cache; puts one that is into its ring.

        Raises:
            CacheLacking: offline, too many samples in a row are missing or damaged.
        """
        lacking = []
        for want in self._rings.take():
            if self._offline or self._cache.has(want.key.sample):
                self._due.append(want)
            else:
                self._cache_counts["misses"] += 1
                lacking.append(want)
        if self._due:
            want = self._due.popleft()
            try:
                self._read(want)
            except BadFile as error:
                lacking += self._without(want, str(error))
        return lacking

    def _read(self, want: Want) -> None:
        slot = self._rings.reserve(want.key)
        if slot is None:  # the rank has left
            return
        token_ids = self._samples.tokens(want.key.sample).astype("<i4").tobytes()
        try:
            self._cache.read(want.key.sample, token_ids, want.layout, slot)
        except BadFile:
            self._rings.abandon(want.key)
            raise
        self._rings.commit(want.key, token_ids, slot)
        self._cache_counts["hits"] += 1
        self._lacking_in_a_row = 0

    def _without(self, want: Want, problem: str) -> list[Want]:
        """What is to be asked of servers for a sample that the cache cannot give."""
        path = self._cache.path(want.key.sample)
        self._cache_counts["corrupt" if path.exists() else "misses"] += 1
        if not self._offline:
            log.warning("cache: %s is not used: %s", path, problem)
            return [want]
        self._lacking_in_a_row += 1
        if self._lacking_in_a_row >= FAILURES_IN_A_ROW:
            raise CacheLacking(
                f"stream.cache: {FAILURES_IN_A_ROW} samples in a row are missing or damaged, the last: {path}: "
                f'{problem}; complete the folder with `dflash-scale generate`, or set stream.mode to "hybrid"'
            )
        log.warning("sample %d (epoch %d) is quarantined: %s: %s", want.key.sample, want.key.epoch, path, problem)
        self.quarantine(want.key, f"{path}: {problem}")
        return []

    # What servers sent.

    def want(self, key: Key) -> Want:
        return self._rings.want(key)

    def reserve(self, key: Key) -> memoryview | None:
        return self._rings.reserve(key)

    def abandon(self, key: Key) -> None:
        self._rings.abandon(key)

    def commit(self, key: Key, token_ids: bytes, states: memoryview) -> None:
        if self._writer is not None and self._writer.fits(len(states)):
            # A copy: the rank frees the slot when it has trained, and the disk may be slower.
            self._writer.put(Sample(key.sample, token_ids, self.want(key).layout, bytes(states)))
        self._rings.commit(key, token_ids, states)

    def quarantine(self, key: Key, reason: str) -> None:
        self._rings.quarantine(key, reason)
