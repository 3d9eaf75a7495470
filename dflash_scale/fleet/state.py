"""The records of the fleet's state machine: samples that are wanted, attempts, servers, and what the receiver is to do.

A reason why something failed or has to wait is `str | None`; None: nothing is wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Final, NamedTuple

REMEMBERED: Final = 256  # latest requests and deliveries, for latencies and rates
BACKOFF_MAX_S: Final = 60.0


class Key(NamedTuple):
    """Which sample, in which epoch."""

    epoch: int
    sample: int

    def __str__(self) -> str:
        return f"sample {self.sample} (epoch {self.epoch})"


class Fault(Enum):
    """Whose fault a failed request is."""

    SAMPLE = "sample"  # the server works and refuses this sample: counts
    BUSY = "busy"  # the server works and has no room now: does not count
    SERVER = "server"  # the server is down: does not count
    DOUBT = "doubt"  # cannot be told: counts if the server delivers other samples


class Lost(Enum):
    """What a server that answers a probe has forgotten of what it was asked before."""

    NOTHING = "nothing"
    CONNECTION = "connection"  # the data connection broke: what was on its way is lost
    RESTARTED = "restarted"  # it is another process


@dataclass(frozen=True, slots=True)
class Limits:
    """Section `stream` of the configuration; bytes are hidden states in flight."""

    credit_bytes: int
    server_credit_bytes: int
    requests_per_server: int
    request_timeout_s: float
    attempts: int
    probe_s: float
    no_server_timeout_s: float


# Actions. `server` is an index in the fleet.


@dataclass(frozen=True, slots=True)
class Send:
    """Action: POST the sample to the server. Exactly one `http_done` must follow."""

    server: int
    key: Key
    attempt: int
    life: int  # of the server, to be handed back with the answer


@dataclass(frozen=True, slots=True)
class Probe:
    """Action: ask the server for a sign of life on both of its ports, then call `probe_done` with this serial."""

    server: int
    serial: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Action: give the data connection up, and all that may come on it; the next probe makes another."""

    server: int


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Action: deliver the sample as a record without payload."""

    key: Key
    reason: str
    servers: tuple[str, ...]  # that were asked


Action = Send | Probe | Cut | Quarantined


@dataclass(slots=True, eq=False)
class Job:
    """One sample that is wanted."""

    key: Key
    tokens: int
    nbytes: int
    servers: dict[int, int] = field(default_factory=dict)  # attempt -> server, all attempts so far
    awaited: int = 0  # attempts whose data somebody waits for
    failures: list[str] = field(default_factory=list)  # the attempts that count against the sample, with their reasons
    failed_on: set[int] = field(default_factory=set)  # servers
    held_since: float = math.inf  # since when its attempts are used up, but not on enough servers
    losses: int = 0  # attempts that came to nothing, whoever is to blame
    crashes: int = 0  # times that a server died, or its connection broke, while this sample was in flight there
    solo_crashes: int = 0  # deaths of servers that had nothing else in flight

    def __str__(self) -> str:
        return str(self.key)


@dataclass(slots=True, eq=False)
class Attempt:
    """One request for a job. It holds credit as long as its data may come."""

    job: Job
    number: int
    server: int
    sent: float
    deadline: float
    solo: bool = False  # nothing else is in flight at the server
    problem: str | None = None  # why it may have failed, while a probe decides
    late: bool = False  # nobody waits for it any more, but its data may still come


@dataclass(slots=True, eq=False)
class Load:
    """What one server was asked for and may still send."""

    attempts: dict[tuple[Key, int], Attempt] = field(default_factory=dict)  # that hold credit, by number too
    outstanding_bytes: int = 0  # credit that all of them hold
    late_bytes: int = 0  # credit that late ones hold
    awaited: int = 0  # how many are not late
    open_requests: int = 0  # HTTP
    solo: Key | None = None  # the sample that has the server to itself

    def doubtful(self) -> list[Attempt]:
        """Those that may have failed."""
        return [attempt for attempt in self.attempts.values() if attempt.problem is not None]


@dataclass(slots=True, eq=False)
class Probing:
    """The probes of one server, one after the other."""

    due: float  # when the next one is sent, if the server is in doubt or not healthy
    serial: int = 0  # of the newest one: the answer to an older one says nothing any more
    deadline: float = math.inf  # finite while one is under way
    tried: bool = False  # the first one has ended, well or not

    @property
    def under_way(self) -> bool:
        return self.deadline < math.inf


@dataclass(slots=True, eq=False)
class Totals:
    """Counts of one server's whole life."""

    samples: int = 0  # delivered
    tokens: int = 0
    bytes: int = 0
    errors: int = 0  # attempts that failed, the server being alive
    busy: int = 0  # attempts that it had no room for
    deaths: int = 0  # times that it was put aside


@dataclass(slots=True, eq=False)
class Pace:
    """Latencies and the rate of the latest requests of one server."""

    http_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # request -> HTTP answer
    data_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # request -> hidden states
    delivered: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # (time, tokens)

    def tokens_per_s(self, now: float) -> float:
        """Since the oldest delivery that is remembered."""
        if not self.delivered:
            return 0.0
        return round(sum(tokens for _, tokens in self.delivered) / max(now - self.delivered[0][0], 1e-3), 1)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed; 0 if there is none."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What the status file says about one server; its keys are these names. Latencies are seconds."""

    http: str
    healthy: bool
    retired: bool  # removed from the fleet
    reason: str  # empty while it is healthy
    strikes: int  # times it was put aside since it delivered
    outstanding_bytes: int
    owed_bytes: int
    open_requests: int
    samples: int
    tokens: int
    bytes: int
    errors: int
    busy: int
    deaths: int
    tokens_per_s: float
    http_p50_s: float  # from the request to the HTTP answer
    http_p99_s: float
    data_p50_s: float  # from the request to the hidden states
    data_p99_s: float


@dataclass(slots=True, eq=False)
class Server:
    """One server. It stays in the fleet's list for ever, so that its index means the same as long as a run lasts."""

    address: str
    since: float  # of the present state
    probing: Probing
    life: int = 0  # grows with every death: late news of an earlier life is told apart
    load: Load = field(default_factory=Load)
    pace: Pace = field(default_factory=Pace)
    totals: Totals = field(default_factory=Totals)
    # Its state, as drawn in fleet.py.
    healthy: bool = False
    in_doubt: bool = False  # it may hang: it gets nothing new until a probe has ended
    retired: bool = False  # removed from the fleet: it gets nothing new, what it was asked for may still come
    closed: bool = False  # retired, and its connection is given up: nothing can come any more
    reason: str | None = "no handshake yet"  # why it is not in service
    last_fault: str | None = None  # why it was put aside the last time
    paused_until: float = -math.inf  # it said that it is busy
    # What happened since its last delivery.
    strikes: int = 0  # times that it was put aside
    failed_keys: set[Key] = field(default_factory=set)  # samples that failed at it
    unconfirmed: list[tuple[Job, str]] = field(default_factory=list)  # failures that are taken back if it is to blame

    @property
    def in_service(self) -> bool:
        return self.healthy and not (self.in_doubt or self.retired)

    def takes_requests(self, now: float) -> bool:
        return self.in_service and now >= self.paused_until

    @property
    def gone(self) -> bool:
        """Whether it was removed and no news of it can come any more."""
        return self.closed and not self.load.open_requests

    @property
    def proven(self) -> bool:
        """Whether it has delivered something since it was put aside, or since the start."""
        return self.totals.samples > 0 and not self.strikes

    def backoff(self, probe_s: float) -> float:
        """Seconds until a server that was put aside is probed."""
        return min(probe_s * 2.0 ** min(self.strikes - 1, 30), max(BACKOFF_MAX_S, probe_s))

    def snapshot(self, now: float) -> ServerStatus:
        return ServerStatus(
            http=self.address,
            healthy=self.healthy,
            retired=self.retired,
            reason=self.reason or "",
            strikes=self.strikes,
            outstanding_bytes=self.load.outstanding_bytes,
            owed_bytes=self.load.late_bytes,
            open_requests=self.load.open_requests,
            **asdict(self.totals),
            tokens_per_s=self.pace.tokens_per_s(now),
            http_p50_s=percentile(self.pace.http_s, 0.5),
            http_p99_s=percentile(self.pace.http_s, 0.99),
            data_p50_s=percentile(self.pace.data_s, 0.5),
            data_p99_s=percentile(self.pace.data_s, 0.99),
        )
