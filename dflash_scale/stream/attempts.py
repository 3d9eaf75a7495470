"""Who was asked for what: the samples that are wanted, the attempts at them, and the credit that these hold.

What an attempt's end means for its sample is decided here; what it means for its server is decided in `faults.py`.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable

from dflash_scale.stream.jobs import Action, Attempt, Job, Key, Limits, Quarantined, Send
from dflash_scale.stream.servers import Server

log = logging.getLogger(__name__)


class Attempts:
    """Jobs, and the attempts that hold credit. `outbox` gets the actions, in their order."""

    def __init__(self, servers: list[Server], limits: Limits) -> None:
        self.waiting: deque[Job] = deque()  # jobs without an attempt that is waited for
        self.outbox: list[Action] = []
        self.retried = 0
        self.issued = 0
        self._servers, self._limits = servers, limits
        self._jobs: dict[Key, Job] = {}

    def __len__(self) -> int:
        """Samples neither delivered nor quarantined yet."""
        return len(self._jobs)

    def add(self, key: Key, tokens: int, nbytes: int) -> None:
        """Wants one more sample of `nbytes` bytes. Raises ValueError if it could never be requested."""
        if nbytes > min(self._limits.server_credit_bytes, self._limits.credit_bytes):
            raise ValueError(
                f"sample {key[1]} needs {nbytes} bytes of credit, stream.server_credit_bytes is "
                f"{self._limits.server_credit_bytes} and stream.credit_bytes {self._limits.credit_bytes}; raise them"
            )
        assert key not in self._jobs, f"sample {key} is outstanding already"
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

    def send(self, job: Job, index: int, now: float, *, alone: bool = False) -> None:
        """Asks a server for a sample."""
        server = self._servers[index]
        number = len(job.servers)
        job.servers[number] = index
        attempt = Attempt(job, number, index, now, now + self._limits.request_timeout_s, alone)
        server.attempts[(job.key, number)] = attempt
        server.alone = job.key if alone else server.alone
        server.outstanding += job.nbytes
        server.open_requests += 1
        server.live += 1
        job.live += 1
        self.issued += 1
        self.outbox.append(Send(index, job.key, number, server.life))

    def let_go(self, attempt: Attempt) -> None:
        """Nobody waits for this attempt any more; its data may still come, and it keeps its credit."""
        if attempt.owed:
            return
        server = self._servers[attempt.server]
        attempt.owed, attempt.deadline = True, math.inf
        server.owed += attempt.job.nbytes
        server.live -= 1
        attempt.job.live -= 1
        if attempt.alone:
            server.alone = None

    def forget(self, index: int, key: Key, number: int) -> Attempt | None:
        """Nothing comes of this attempt any more: gives its credit back."""
        server = self._servers[index]
        attempt = server.attempts.pop((key, number), None)
        if attempt is not None:
            self.let_go(attempt)
            server.owed -= attempt.job.nbytes
            server.outstanding -= attempt.job.nbytes
        return attempt

    def release(self, index: int) -> None:
        """Nothing comes from this server any more: gives all of its credit back."""
        for key, number in list(self._servers[index].attempts):
            self.forget(index, key, number)

    def requeue(self, attempts: Iterable[Attempt]) -> int:
        """Lets attempts go without counting them; their samples, so many, are the next to be requested, in order."""
        again = []
        for attempt in attempts:
            self.let_go(attempt)
            job = attempt.job
            if self.wanted(job) and not job.live and job not in self.waiting:
                again.append(job)
        self.retried += len(again)
        self.waiting.extendleft(reversed(again))
        return len(again)

    def blame(self, attempt: Attempt, now: float) -> str:
        """Counts an attempt against its sample; gives the reason as it is kept."""
        job, server = attempt.job, self._servers[attempt.server]
        self.let_go(attempt)
        failure = f"attempt {len(job.failures) + 1} at {server.address}: {attempt.doubt}"
        if not self.wanted(job):
            return failure
        job.failures.append(failure)
        job.failed_on.add(attempt.server)
        job.troubles += 1
        log.info("%s failed, %s", job, failure)
        if len(job.failures) >= self._limits.attempts:
            others = sum(not server.retired and i not in job.failed_on for i, server in enumerate(self._servers))
            if len(job.failed_on) >= max(2, self._limits.attempts) or not others:
                self.quarantine(job)
                return failure
            job.held_since = min(job.held_since, now)
        if not job.live:
            self.retried += 1
            self.waiting.appendleft(job)
        return failure

    def take_back(self, job: Job, failure: str) -> None:
        """A failure that was counted was the server's fault."""
        if self.wanted(job) and failure in job.failures:
            job.failures.remove(failure)
            if len(job.failures) < self._limits.attempts:
                job.held_since = math.inf

    def quarantine(self, job: Job) -> None:
        reason = "; ".join(job.failures)
        log.warning("%s is quarantined: %s", job, reason)
        self.finish(job)
        asked = tuple(sorted({self._servers[index].address for index in job.servers.values()}))
        self.outbox.append(Quarantined(job.key, reason, asked))

    def finish(self, job: Job) -> None:
        """Nobody wants the sample any more."""
        del self._jobs[job.key]
        if job in self.waiting:
            self.waiting.remove(job)
