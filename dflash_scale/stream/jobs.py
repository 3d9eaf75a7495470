"""The records of the fleet's state machine: what is wanted, of whom it was asked, and what the receiver is to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Key = tuple[int, int]  # (epoch, sample)


class Fault(Enum):
    """Whose fault a failed request is."""

    SAMPLE = "sample"  # the server works and refuses this sample: counts
    SERVER = "server"  # the server is down: does not count
    DOUBT = "doubt"  # a probe decides


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
class Quarantined:
    """Action: deliver the sample as a record without payload."""

    key: Key
    reason: str


Action = Send | Probe | Quarantined


@dataclass(slots=True, eq=False)
class Job:
    """One sample that is wanted."""

    key: Key
    tokens: int
    nbytes: int
    servers: dict[int, int] = field(default_factory=dict)  # attempt -> server, all attempts so far
    failures: list[str] = field(default_factory=list)
    failed_on: set[int] = field(default_factory=set)
    held_since: float = math.inf  # attempts used up, but on one server only
    breaks: int = 0  # connections that broke while it was on its way
    live: int = 0  # attempts that may still deliver

    def __str__(self) -> str:
        return f"sample {self.key[1]} (epoch {self.key[0]})"


@dataclass(slots=True, eq=False)
class Attempt:
    """One request for a job that may still deliver, and holds credit."""

    job: Job
    number: int
    server: int
    deadline: float
    doubt: str = ""  # the reason, while a probe decides


@dataclass(slots=True, eq=False)
class Server:
    """What is known of one server."""

    address: str
    healthy: bool = False
    greeted: bool = False  # its first probe has ended
    in_doubt: bool = False
    reason: str = "not greeted yet"
    life: int = 0  # grows with every death: late news of an earlier life is told apart
    since: float = 0.0  # of the present state
    outstanding: int = 0  # bytes
    open_requests: int = 0
    failed_keys: set[Key] = field(default_factory=set)  # since the last delivery
    next_probe: float = 0.0
    probe_serial: int = 0
    probe_deadline: float = math.inf  # finite while a probe is under way
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    errors: int = 0
    deaths: int = 0

    def snapshot(self) -> dict[str, Any]:
        """What the status file says about it."""
        return {
            "http": self.address,
            "healthy": self.healthy,
            "reason": self.reason,
            "outstanding_bytes": self.outstanding,
            "open_requests": self.open_requests,
            "samples": self.samples,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "errors": self.errors,
            "deaths": self.deaths,
        }
