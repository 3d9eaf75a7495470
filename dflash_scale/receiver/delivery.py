"""From a server's message to a sample where it is wanted: what is checked on the way, and what is thrown away.

The payload goes from ZeroMQ's message straight to its place; no other copy is made. A sample that was taken from a
`Sink` is committed or quarantined, exactly one of the two, and once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Final, Protocol

from dflash_scale.fleet.state import Key
from dflash_scale.receiver.prefetch import Want
from dflash_scale.receiver.requests import Requests
from dflash_scale.transport.layout import WireError
from dflash_scale.transport.messages import Header, check_payload
from dflash_scale.transport.sockets import Incoming

log = logging.getLogger(__name__)

LOG_EVERY_S: Final = 60.0


class Sink(Protocol):
    """Where samples go, and which ones are wanted there."""

    @property
    def attached(self) -> bool:
        """Whether everybody is there who wants samples."""
        ...

    @property
    def backlog(self) -> bool:
        """Whether `take` has more to do at once."""
        ...

    @property
    def blocked_on(self) -> str:
        """What more samples wait for, as the status file says it."""
        ...

    def take(self) -> list[Want]:
        """The samples that servers may be asked for since the last call. Call it every few milliseconds."""
        ...

    def want(self, key: Key) -> Want:
        """What was taken under this key and is neither committed nor quarantined."""
        ...

    def reserve(self, key: Key) -> memoryview | None:
        """Where the sample's hidden states go; `commit` or `abandon` must follow before the next `reserve`.

        None: nobody wants the sample any more, and it is forgotten.
        """
        ...

    def abandon(self, key: Key) -> None:
        """What was written to the place that was reserved is void; the sample is still wanted."""
        ...

    def commit(self, key: Key, token_ids: bytes, states: memoryview) -> None:
        """`states`, the place that was reserved or its beginning, holds the sample. token_ids: int32, little-endian."""
        ...

    def quarantine(self, key: Key, reason: str) -> None:
        """No server can deliver the sample: it is named and left out."""
        ...


class Unusable(ValueError):
    """A message that is thrown away, counted under `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Dropped:
    """Counts messages that are thrown away, and says so at most once a minute per reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._said: dict[str, tuple[float, int]] = {}

    def __call__(self, reason: str, detail: str, server: str) -> None:
        self.counts[reason] += 1
        when, count = self._said.get(reason, (-LOG_EVERY_S, 0))
        if time.monotonic() - when >= LOG_EVERY_S:
            self._said[reason] = time.monotonic(), self.counts[reason]
            log.warning(
                "dropped %d message(s), %s; the last from %s: %s", self.counts[reason] - count, reason, server, detail
            )


def deliver(incoming: Incoming, header: Header, key: Key, sink: Sink, requests: Requests) -> None:
    """Moves the payload of a message into the sink, which wants the sample.

    Raises:
        Unusable: it is not what was asked for; the sample is still wanted.
    """
    want = sink.want(key)
    if header.layout != want.layout:
        raise Unusable("wrong layout", f"{header.layout} came, {want.layout} was asked for")
    if not incoming.more:
        raise Unusable("malformed", "the token ids are missing")
    token_ids = incoming.read()
    if problem := requests.problem(key.sample, token_ids):
        raise Unusable("wrong tokens", problem)
    if len(token_ids) != header.token_bytes:
        raise Unusable("malformed", f"{header.token_bytes} bytes of token ids were announced, {len(token_ids)} came")
    if not incoming.more:
        raise Unusable("malformed", "the hidden states are missing")
    place = sink.reserve(key)
    if place is None:
        return
    states = place[: header.hidden_bytes]
    try:
        _fill(states, incoming, header, token_ids)
    except Unusable:
        sink.abandon(key)
        raise
    sink.commit(key, token_ids, states)


def _fill(states: memoryview, incoming: Incoming, header: Header, token_ids: bytes) -> None:
    received = incoming.read_into(states)
    if incoming.more or received != len(states):
        raise Unusable("malformed", f"{len(states)} bytes in one frame were announced, {received} or more frames came")
    try:
        check_payload(header, token_ids, states)
    except WireError as error:
        raise Unusable("corrupt", str(error)) from error
