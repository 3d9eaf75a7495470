"""Which server a waiting sample is asked of.

- Among the servers that the sample has not failed on, then among those without a failure since their last delivery if
  the sample has come to nothing before, the one with the least credit in use.
- A server that was put aside and has delivered nothing since is on probation: it gets one request at a time, and one of
  those with the fewest losses so far, so that it does not use up the attempts of many samples, and so that a sample
  that is to blame itself is not what it is judged by.
- A sample that was in flight at `Limits.attempts` (at least two) deaths or broken connections may be their cause, a
  poison message: it is tried alone. The servers are emptied for that one at a time, by giving one of them nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dflash_scale.fleet.state import Job, Limits, Server


def may_be_poison(job: Job, limits: Limits) -> bool:
    """Whether the sample may be what kills servers."""
    return job.crashes >= max(2, limits.attempts)


class Round:
    """One round of choices at one moment.

    Attributes:
        blocked: why the first job without a place has none: "no server", "busy", "requests" or "credit".
        kept_from_probation: the last job without a place was held back because a server on probation takes only the
            waiting jobs with the fewest losses.
    """

    def __init__(self, servers: Sequence[Server], limits: Limits, waiting: Iterable[Job], now: float) -> None:
        self.blocked: str | None = None
        self.kept_from_probation = False
        self._servers = servers
        self._limits = limits
        self._now = now
        self._fewest_losses = min((job.losses for job in waiting), default=0)
        self._reserved: int | None = None  # the server that is being emptied for a solo attempt

    def place_solo(self, job: Job) -> int | None:
        """An empty server for a job that may be poison; None while one is being emptied, or has another such job."""
        if any(server.load.solo for server in self._servers):
            return None
        usable = [i for i, server in enumerate(self._servers) if server.takes_requests(self._now)]
        usable = [i for i in usable if not self._servers[i].strikes or job.losses <= self._fewest_losses]
        fresh = [i for i in usable if i not in job.failed_on] or usable
        if not fresh:
            return None

        def emptiness(index: int) -> tuple[bool, int]:
            server = self._servers[index]
            return not server.proven, server.load.awaited + server.load.open_requests

        self._reserved = min(fresh, key=emptiness)
        if emptiness(self._reserved)[1]:
            return None
        return self._reserved if self._fits(job, self._reserved) else self._blocked("credit")

    def place(self, job: Job) -> int | None:
        """A server for a job that is not tried alone.

        Each step leaves fewer servers, and the step that leaves none names what the job waits for.
        """
        self.kept_from_probation = False
        in_service = [i for i, server in enumerate(self._servers) if server.in_service]
        if not in_service:
            return self._blocked("no server")
        usable = [i for i in in_service if self._servers[i].takes_requests(self._now)]
        if not usable:
            return self._blocked("busy")
        usable = [i for i in usable if self._accepts(i, job)]
        # Another server is better, the same one will do; but a job whose attempts are used up has to fail on another
        # before it is quarantined, so it waits for one.
        fresh = [i for i in usable if i not in job.failed_on]
        if fresh or job.held_since < math.inf:
            usable = fresh
        with_slot = [i for i in usable if self._servers[i].load.open_requests < self._limits.requests_per_server]
        if not with_slot:
            return self._blocked("requests")
        # A server that fails samples is not the one to tell whether this sample is what fails.
        best = min(with_slot, key=lambda i: (bool(job.losses and self._servers[i].failed_keys), self._credit(i)))
        # No other server has more room, unless it is one that fails samples: the job waits for this one.
        return best if self._fits(job, best) else self._blocked("credit")

    def _accepts(self, index: int, job: Job) -> bool:
        server = self._servers[index]
        if index == self._reserved or server.load.solo:
            return False
        if server.strikes and job.losses > self._fewest_losses:
            self.kept_from_probation = True
            return False
        return not (server.strikes and server.load.awaited)

    def _credit(self, index: int) -> int:
        return self._servers[index].load.outstanding_bytes

    def _fits(self, job: Job, index: int) -> bool:
        room = self._limits.server_credit_bytes - self._credit(index)
        in_all = self._limits.credit_bytes - sum(server.load.outstanding_bytes for server in self._servers)
        return job.nbytes <= min(room, in_all)

    def _blocked(self, why: str) -> int | None:
        self.blocked = self.blocked or why
        return None
