"""The words of the fleet's state machine: what is wanted, of whom it was asked, and what the receiver is to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

Key = tuple[int, int]  # (epoch, sample)


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
    failures: list[str] = field(default_factory=list)  # those that count
    failed_on: set[int] = field(default_factory=set)
    held_since: float = math.inf  # attempts used up, but not on enough servers
    losses: int = 0  # times that a server died, or its connection broke, while this sample was in flight there
    killed: int = 0  # of them, deaths of servers that had nothing else
    troubles: int = 0  # attempts that came to nothing, whoever is to blame
    live: int = 0  # attempts that are waited for

    def __str__(self) -> str:
        return f"sample {self.key[1]} (epoch {self.key[0]})"


@dataclass(slots=True, eq=False)
class Attempt:
    """One request for a job. It holds credit as long as its data may come."""

    job: Job
    number: int
    server: int
    sent: float
    deadline: float
    alone: bool = False  # nothing else was in flight at the server
    doubt: str = ""  # the reason, while a probe decides
    owed: bool = False  # nobody waits for it any more
