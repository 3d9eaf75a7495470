"""Which server a waiting sample is asked of.

- Among the servers that the sample has not failed on, then among those that have delivered since their last failure,
  the one with the least credit in use.
- A server that was put aside and has delivered nothing since is on probation: it gets one request at a time, and one of
  those that have had the least trouble so far, so that it does not use up the attempts of many samples, and so that a
  sample that is to blame itself is not what it is judged by.
- A sample that was in flight at `Limits.attempts` (at least two) deaths or broken connections may be their cause: it is
  tried alone. The servers are emptied for that one at a time, by giving one of them nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dflash_scale.stream.jobs import Job, Limits
from dflash_scale.stream.servers import Server


def suspect(job: Job, limits: Limits) -> bool:
    """Whether the sample may be what kills servers."""
    return job.losses >= max(2, limits.attempts)


class Round:
    """One round of choices at one moment.

    Attributes:
        blocked: why the first job without a place has none: "no server", "busy", "requests" or "credit".
        picky: whether the last job without a place was kept from a server on probation by another that waits.
    """

    def __init__(self, servers: Sequence[Server], limits: Limits, waiting: Iterable[Job], now: float) -> None:
        self._servers, self._limits, self._now = servers, limits, now
        self._least = min((job.troubles for job in waiting), default=0)
        self._reserved: int | None = None
        self.blocked, self.picky = "", False

    def place_alone(self, job: Job) -> int | None:
        """An empty server for a suspect; None while one is being emptied, or has another suspect."""
        if any(server.alone for server in self._servers):
            return None
        usable = [i for i, server in enumerate(self._servers) if server.takes_requests(self._now)]
        usable = [i for i in usable if not self._servers[i].strikes or job.troubles <= self._least]
        fresh = [i for i in usable if i not in job.failed_on] or usable
        if not fresh:
            return None

        def emptiness(index: int) -> tuple[bool, int]:
            server = self._servers[index]
            return not server.proven, server.live + server.open_requests

        self._reserved = min(fresh, key=emptiness)
        if emptiness(self._reserved)[1]:
            return None
        return self._reserved if self._fits(job, self._reserved) else self._blocked("credit")

    def place(self, job: Job) -> int | None:
        """A server for a job that is not a suspect."""
        self.picky = False
        willing = [i for i, server in enumerate(self._servers) if server.healthy and not server.retired]
        willing = [i for i in willing if not self._servers[i].in_doubt]
        if not willing:
            return self._blocked("no server")
        usable = [i for i in willing if self._servers[i].takes_requests(self._now)]
        if not usable:
            return self._blocked("busy")
        usable = [i for i in usable if self._accepts(i, job)]
        fresh = [i for i in usable if i not in job.failed_on]
        if fresh or job.held_since < math.inf:
            usable = fresh
        if not usable:
            return self._blocked("requests")
        with_slot = [i for i in usable if self._servers[i].open_requests < self._limits.requests_per_server]
        if not with_slot:
            return self._blocked("requests")
        best = min(with_slot, key=lambda i: (bool(job.troubles and self._servers[i].failed_keys), self._load(i)))
        return best if self._fits(job, best) else self._blocked("credit")

    def _accepts(self, index: int, job: Job) -> bool:
        server = self._servers[index]
        if index == self._reserved or server.alone:
            return False
        if server.strikes and job.troubles > self._least:
            self.picky = True
            return False
        return not (server.strikes and server.live)

    def _load(self, index: int) -> int:
        return self._servers[index].outstanding

    def _fits(self, job: Job, index: int) -> bool:
        room = self._limits.server_credit_bytes - self._load(index)
        in_all = self._limits.credit_bytes - sum(server.outstanding for server in self._servers)
        return job.nbytes <= min(room, in_all)

    def _blocked(self, why: str) -> int | None:
        self.blocked = self.blocked or why
        return None
