"""What is known of one server: its state, what it holds of the fleet's credit, and how fast it is."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from dflash_scale.stream.jobs import Attempt, Job, Key

REMEMBERED: Final = 256  # latest requests and deliveries, for latencies and rates
BACKOFF_MAX_S: Final = 60.0


@dataclass(slots=True, eq=False)
class Pace:
    """Latencies and the rate of the latest requests of one server."""

    http_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # request -> HTTP answer
    data_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # request -> hidden states
    delivered: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # (time, tokens)

    def snapshot(self, now: float) -> dict[str, float]:
        """Median and 99th percentile in seconds; tokens per second since the oldest delivery that is remembered."""
        rate = 0.0
        if self.delivered:
            rate = sum(tokens for _, tokens in self.delivered) / max(now - self.delivered[0][0], 1e-3)
        return {
            "tokens_per_s": round(rate, 1),
            "http_p50_s": percentile(self.http_s, 0.5),
            "http_p99_s": percentile(self.http_s, 0.99),
            "data_p50_s": percentile(self.data_s, 0.5),
            "data_p99_s": percentile(self.data_s, 0.99),
        }


def percentile(values: deque[float], share: float) -> float:
    """The value that `share` of the values do not exceed; 0 if there is none."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0


@dataclass(slots=True, eq=False)
class Server:
    """One server. It stays in the fleet's list for ever, so that its index means the same as long as a run lasts."""

    address: str
    healthy: bool = False
    greeted: bool = False  # its first probe has ended
    in_doubt: bool = False
    retired: bool = False  # removed from the fleet: gets nothing new
    closed: bool = False  # and owes nothing any more
    reason: str = "not greeted yet"
    fault: str = ""  # why it was put aside the last time
    life: int = 0  # grows with every death: late news of an earlier life is told apart
    since: float = 0.0  # of the present state
    strikes: int = 0  # times it was put aside since its last delivery
    paused_until: float = -math.inf  # it said that it is busy
    outstanding: int = 0  # bytes of all attempts
    owed: int = 0  # bytes, of them, that nobody waits for but that may still come
    live: int = 0  # attempts that somebody waits for
    open_requests: int = 0
    alone: Key | None = None  # the sample that is tried here with nothing beside it
    attempts: dict[tuple[Key, int], Attempt] = field(default_factory=dict)  # that hold credit
    failed_keys: set[Key] = field(default_factory=set)  # since the last delivery
    unconfirmed: list[tuple[Job, str]] = field(default_factory=list)  # failures since then that it may be guilty of
    next_probe: float = 0.0
    probe_serial: int = 0
    probe_deadline: float = math.inf  # finite while a probe is under way
    pace: Pace = field(default_factory=Pace)
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    errors: int = 0
    busy: int = 0
    deaths: int = 0

    def takes_requests(self, now: float) -> bool:
        return self.healthy and not (self.in_doubt or self.retired) and now >= self.paused_until

    @property
    def gone(self) -> bool:
        """Whether it was removed and no news of it can come any more."""
        return self.closed and not self.open_requests

    @property
    def proven(self) -> bool:
        """Whether it has delivered something since it was put aside, or since the start."""
        return self.samples > 0 and not self.strikes

    def backoff(self, probe_s: float) -> float:
        """Seconds until a server that was put aside is probed."""
        return min(probe_s * 2.0 ** min(self.strikes - 1, 30), max(BACKOFF_MAX_S, probe_s))

    def snapshot(self, now: float) -> dict[str, Any]:
        """What the status file says about it."""
        return {
            "http": self.address,
            "healthy": self.healthy,
            "retired": self.retired,
            "reason": self.reason,
            "strikes": self.strikes,
            "outstanding_bytes": self.outstanding,
            "owed_bytes": self.owed,
            "open_requests": self.open_requests,
            "samples": self.samples,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "errors": self.errors,
            "busy": self.busy,
            "deaths": self.deaths,
            **self.pace.snapshot(now),
        }
