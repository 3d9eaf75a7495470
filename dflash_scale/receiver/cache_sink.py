"""The sink of `generate` and `answer`: takes every sample to the cache.

A sample is present (its file was there and is good), written or quarantined, exactly one of the three. Files that are
there are read in the loop, one a turn; what servers send goes to the writing thread as it came, without a copy.
"""

from __future__ import annotations

import json
import queue
from collections import Counter
from typing import Final

import numpy as np

from dflash_scale.cache.file import BadFile
from dflash_scale.cache.folder import Cache
from dflash_scale.cache.writer import CacheWriter, Sample
from dflash_scale.fleet.state import Key
from dflash_scale.receiver.prefetch import Want
from dflash_scale.receiver.requests import Requests
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.messages import TOKEN_ID_BYTES

QUARANTINED_FILE: Final = "quarantined.jsonl"
MOST_IN_HAND: Final = 4096  # samples that are asked for at once


class CacheUnwritable(RuntimeError):
    """The cache can take no more."""


class CacheSink:
    """A `Sink` into files, and when there is an end to it.

    Args:
        requests: the samples.
        cache: the folder.
        layout: what every file holds.
        most_bytes: of states that are asked for, or here and not yet written.
    """

    def __init__(self, requests: Requests, cache: Cache, layout: Layout, most_bytes: int) -> None:
        self._requests = requests
        self._cache = cache
        self._layout = layout
        self._most_bytes = most_bytes
        self._lengths = requests.lengths
        self.attached = True
        self.backlog = False
        self.counts: Counter[str] = Counter()  # present, written, written_bytes, quarantined
        self._next = 0
        self._in_hand: dict[int, Want] = {}
        self._bytes_in_hand = 0
        self._being_written: dict[int, int] = {}  # sample -> bytes of states
        self._scratch = memoryview(bytearray(int(self._lengths.max()) * layout.bytes_per_token))
        self._reports: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._writer = CacheWriter(cache, most_bytes, report=lambda *report: self._reports.put(report))
        # Those of an earlier run are asked for again.
        self._quarantined = (cache.folder / QUARANTINED_FILE).open("w", encoding="utf-8", buffering=1)

    @property
    def complete(self) -> bool:
        return self._next == len(self._lengths) and not self._in_hand

    @property
    def blocked_on(self) -> str:
        return "cache"  # nothing is asked for: files are read, or the disk has to catch up

    def status(self) -> dict[str, int]:
        """Counts: samples = present + written + quarantined, once it is complete."""
        names = ("present", "written", "written_bytes", "quarantined")
        return {"samples": len(self._lengths), **{name: self.counts[name] for name in names}}

    def take(self) -> list[Want]:
        """Samples to ask for, after a look at one file that is there.

        Raises:
            CacheUnwritable: a file could not be written.
        """
        self._count_written()
        taken: list[Want] = []
        self.backlog = False
        while self._next < len(self._lengths) and len(self._in_hand) < MOST_IN_HAND:
            want = Want(Key(0, self._next), int(self._lengths[self._next]), self._layout)
            if self._in_hand and self._bytes_in_hand + want.nbytes > self._most_bytes:
                break
            there = self._cache.has(self._next)
            if there and self.backlog:  # the next turn's
                break
            self.backlog = self.backlog or there
            self._next += 1
            if there and self._is_good(want):
                self.counts["present"] += 1
                continue
            self._in_hand[want.key.sample] = want
            self._bytes_in_hand += want.nbytes
            taken.append(want)
        return taken

    def _is_good(self, want: Want) -> bool:
        sample = want.key.sample
        try:
            token_ids = self._cache.token_ids(sample, want.tokens)
            nbytes = len(token_ids) // TOKEN_ID_BYTES * self._layout.bytes_per_token
            self._cache.read(sample, token_ids, self._layout, self._scratch[:nbytes])
        except BadFile:
            return False
        return not self._requests.problem(sample, token_ids)

    def want(self, key: Key) -> Want:
        return self._in_hand[key.sample]

    def reserve(self, key: Key) -> memoryview:
        return np.empty(self.want(key).nbytes, np.uint8).data  # not zeroed: all of it is written

    def abandon(self, key: Key) -> None:
        """Nobody else holds what was reserved."""

    def commit(self, key: Key, token_ids: bytes, states: memoryview) -> None:
        self._being_written[key.sample] = len(states)
        self._writer.put(Sample(key.sample, token_ids, self._layout, states))

    def quarantine(self, key: Key, reason: str) -> None:
        self._done(key.sample, "quarantined")
        self._quarantined.write(json.dumps({"sample": key.sample, "reason": reason}) + "\n")

    def close(self) -> None:
        """Writes what is here. Raises CacheUnwritable as `take` does."""
        self._writer.close()
        self._quarantined.close()
        self._count_written()

    def _count_written(self) -> None:
        while not self._reports.empty():
            sample, problem = self._reports.get()
            if problem:
                raise CacheUnwritable(f"{self._cache.path(sample)} could not be written: {problem}")
            self.counts["written_bytes"] += self._being_written.pop(sample)
            self._done(sample, "written")

    def _done(self, sample: int, what: str) -> None:
        self._bytes_in_hand -= self._in_hand.pop(sample).nbytes
        self.counts[what] += 1
