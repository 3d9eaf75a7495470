"""What was asked of whom: the samples that are wanted, the attempts at them, and the credit that these hold.

Bookkeeping alone: nothing is decided here. An attempt is awaited until its data comes or it is abandoned; abandoned, it
is late, and holds its credit until nothing can come of it any more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from dflash_scale.fleet.state import Attempt, Job, Key, Limits, Send, Server


class InFlight:
    """Jobs, and attempts that hold credit. `index` is a server's place in the list, `number` that of an attempt."""

    def __init__(self, servers: Sequence[Server], limits: Limits) -> None:
        self.waiting: deque[Job] = deque()  # jobs without an awaited attempt
        self.retried = 0
        self.issued = 0
        self._servers = servers
        self._limits = limits
        self._jobs: dict[Key, Job] = {}

    def __len__(self) -> int:
        """Samples neither delivered nor quarantined yet."""
        return len(self._jobs)

    def add(self, key: Key, tokens: int, nbytes: int) -> None:
        """Wants one more sample of `nbytes` bytes. Raises ValueError if it could never be requested."""
        if nbytes > min(self._limits.server_credit_bytes, self._limits.credit_bytes):
            raise ValueError(
                f"sample {key.sample} needs {nbytes} bytes of credit, stream.server_credit_bytes is "
                f"{self._limits.server_credit_bytes} and stream.credit_bytes {self._limits.credit_bytes}; raise them"
            )
        assert key not in self._jobs, f"{key} is outstanding already"
        job = Job(key, tokens, nbytes)
        self._jobs[key] = job
        self.waiting.append(job)

    def wanted(self, job: Job) -> bool:
        return self._jobs.get(job.key) is job

    def claim(self, index: int, key: Key, number: int) -> Job | None:
        """The job that data of this attempt from this server may fulfil; None when it is late, double or unknown."""
        job = self._jobs.get(key)
        if job is None or job.servers.get(number) != index:
            self.forget(index, key, number)
            return None
        return job

    def send(self, job: Job, index: int, now: float, *, solo: bool = False) -> Send:
        """Books one more attempt, at this server; gives the request."""
        server = self._servers[index]
        number = len(job.servers)
        job.servers[number] = index
        job.awaited += 1
        load = server.load
        load.attempts[(job.key, number)] = Attempt(job, number, index, now, now + self._limits.request_timeout_s, solo)
        load.outstanding_bytes += job.nbytes
        load.awaited += 1
        load.open_requests += 1
        if solo:
            load.solo = job.key
        self.issued += 1
        return Send(index, job.key, number, server.life)

    def abandon(self, attempt: Attempt) -> None:
        """Nobody waits for this attempt any more; its data may still come, and it keeps its credit."""
        if attempt.late:
            return
        attempt.late = True
        attempt.deadline = math.inf
        attempt.job.awaited -= 1
        load = self._servers[attempt.server].load
        load.late_bytes += attempt.job.nbytes
        load.awaited -= 1
        if attempt.solo:
            load.solo = None

    def forget(self, index: int, key: Key, number: int) -> Attempt | None:
        """Nothing comes of this attempt any more: gives its credit back."""
        load = self._servers[index].load
        attempt = load.attempts.pop((key, number), None)
        if attempt is not None:
            self.abandon(attempt)
            load.late_bytes -= attempt.job.nbytes
            load.outstanding_bytes -= attempt.job.nbytes
        return attempt

    def release(self, index: int) -> None:
        """Nothing comes from this server any more: gives all of its credit back."""
        for key, number in list(self._servers[index].load.attempts):
            self.forget(index, key, number)

    def requeue(self, attempts: Iterable[Attempt]) -> int:
        """Abandons attempts; their samples, so many, are the next to be requested, in this order."""
        again = []
        for attempt in attempts:
            self.abandon(attempt)
            job = attempt.job
            if self.wanted(job) and not job.awaited and job not in self.waiting:
                again.append(job)
        self.retried += len(again)
        self.waiting.extendleft(reversed(again))
        return len(again)

    def finish(self, job: Job) -> None:
        """Nobody wants the sample any more."""
        del self._jobs[job.key]
        if job in self.waiting:
            self.waiting.remove(job)
