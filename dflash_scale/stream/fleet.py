"""Which server is asked for which sample, and what happens when the answer does not come.

`Fleet` is a state machine without sockets, threads or clocks: the receiver tells it what happened and at what time, and
carries out the actions that `poll` returns. The rules:

- A sample is a job from `add` until it is delivered or quarantined, exactly one of the two. It may be asked for
  several times, one attempt after the other; whichever attempt's data comes first is taken, and only once.
- An attempt holds its bytes as credit at its server from the request until its data, its failure, or that server's
  death.
- An attempt that failed because of the sample (a refusal, bad data) counts against the sample; the next one goes to
  another server if there is one. After `Limits.attempts` of them, on more than one server where there is more than one,
  the sample is quarantined with all reasons.
- An attempt that was lost because its server is down or was restarted does not count: however often servers are killed,
  no sample is quarantined for it.
- Where the two cannot be told apart (a timeout, HTTP 5xx), the server is in doubt: it gets nothing new, is probed at
  once, and the probe decides.

                 probe answered                          connection lost, probe failed,
     unhealthy ------------------> healthy ------------> FAILURES_IN_A_ROW different samples failed
         ^  '--- probed every probe_s   ^  '-- timeout, 5xx, disconnect --> in doubt --.
         |                              '----------- probe answered -------------------|
         '-------------------------------------------- probe failed ------------------'
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from dflash_scale.stream.jobs import (
    Action,
    Attempt,
    Fault,
    Job,
    Key,
    Limits,
    Lost,
    Probe,
    Quarantined,
    Send,
    Server,
)

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW: Final = 5  # different samples that fail with no delivery between them: then it is the server
REASON_CHARS: Final = 300


class NoServerError(RuntimeError):
    """No server has been healthy for `Limits.no_server_timeout_s`."""


class Fleet:
    """The state machine. Times are seconds of any monotonic clock."""

    def __init__(self, addresses: Sequence[str], limits: Limits, now: float) -> None:
        self.servers = [Server(address, since=now, next_probe=now) for address in addresses]
        self.limits = limits
        self.retried = 0
        self.issued = 0
        self.blocked = ""  # why the first waiting sample is not requested: "no server", "credit" or "requests"
        self._jobs: dict[Key, Job] = {}
        self._waiting: deque[Job] = deque()
        self._attempts: dict[tuple[Key, int], Attempt] = {}
        self._outbox: list[Action] = []
        self._last_healthy = now
        self._next_scan = now

    # What is wanted and how far it is.

    def add(self, key: Key, tokens: int, nbytes: int) -> None:
        """Wants one more sample of `nbytes` bytes.

        Raises:
            ValueError: the sample is larger than the credit, so it could never be requested.
        """
        if nbytes > min(self.limits.server_credit_bytes, self.limits.credit_bytes):
            raise ValueError(
                f"sample {key[1]} needs {nbytes} bytes of credit, stream.server_credit_bytes is "
                f"{self.limits.server_credit_bytes} and stream.credit_bytes {self.limits.credit_bytes}; raise them"
            )
        assert key not in self._jobs, f"sample {key} is outstanding already"
        job = Job(key, tokens, nbytes)
        self._jobs[key] = job
        self._waiting.append(job)

    def __len__(self) -> int:
        """Samples neither delivered nor quarantined yet."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Samples that no server has been asked for at the moment."""
        return len(self._waiting)

    @property
    def outstanding_bytes(self) -> int:
        return sum(server.outstanding for server in self.servers)

    def claim(self, server: int, key: Key, attempt: int) -> Job | None:
        """The job that data of this attempt from this server may fulfil; None when it is late, double or unknown."""
        job = self._jobs.get(key)
        if job is None or job.servers.get(attempt) != server:
            self._forget(key, attempt, server)
            return None
        return job

    # What happened.

    def delivered(self, job: Job, attempt: int) -> None:
        """The data of a claimed job is committed."""
        server = self.servers[job.servers[attempt]]
        server.samples += 1
        server.tokens += job.tokens
        server.bytes += job.nbytes
        server.failed_keys.clear()
        self._forget(job.key, attempt)
        self._finish(job)

    def rejected(self, server: int, key: Key, attempt: int, reason: str, now: float) -> None:
        """The server refused this attempt, or sent something else than what was asked for."""
        found = self._attempts.get((key, attempt))
        if found is not None and found.server == server:
            self._failed(found, reason, now)

    def http_done(self, sent: Send, fault: Fault | None, reason: str, now: float) -> None:
        """The HTTP request is over; without a fault, the data may be here already or still be on its way."""
        server = self.servers[sent.server]
        server.open_requests -= 1
        attempt = self._attempts.get((sent.key, sent.attempt))
        if fault is Fault.SERVER and sent.life == server.life and server.healthy:
            self._down(sent.server, reason, now)
        elif attempt is None:
            return
        elif fault is None:
            attempt.deadline = math.inf if attempt.doubt else now + self.limits.request_timeout_s
        elif fault is Fault.SAMPLE:
            self._failed(attempt, reason, now)
        else:
            self._doubt(attempt, reason, now)

    def disconnected(self, server: int, now: float) -> None:
        """The data connection to the server broke."""
        state = self.servers[server]
        if state.healthy and not state.in_doubt:
            state.in_doubt, state.next_probe = True, now

    def probe_done(self, probe: Probe, problem: str, now: float, lost: Lost = Lost.NOTHING) -> None:
        """A probe ended. `problem` is empty when the server answered on both ports; `lost` says whether what was asked
        of it before the probe can still come."""
        server = self.servers[probe.server]
        if probe.serial != server.probe_serial or server.probe_deadline == math.inf:
            return  # the answer to a probe that was given up
        server.greeted, server.probe_deadline, server.next_probe = True, math.inf, now + self.limits.probe_s
        if problem:
            self._down(probe.server, problem, now)
            return
        if server.healthy and lost is Lost.RESTARTED:
            self._down(probe.server, "it was restarted", now)
        elif server.healthy and lost is Lost.CONNECTION:
            self._ask_again(probe.server, now)
        self._up(probe.server, now)
        for attempt in [a for a in self._attempts.values() if a.server == probe.server and a.doubt]:
            if (attempt.job.key, attempt.number) in self._attempts:  # the ones before it may have ended the server
                self._failed(attempt, attempt.doubt, now)

    # What to do.

    def poll(self, now: float) -> list[Action]:
        """The actions that are due. Call it after every event, and at least a few times a second.

        Raises:
            NoServerError: samples are wanted, and no server has been healthy for too long.
        """
        if now >= self._next_scan:
            self._next_scan = now + min(0.25, self.limits.request_timeout_s / 10)
            for attempt in [a for a in self._attempts.values() if now >= a.deadline]:
                self._doubt(attempt, f"no data within {self.limits.request_timeout_s:g} s", now)
        self._probe(now)
        self._dispatch(now)
        if any(server.healthy for server in self.servers):
            self._last_healthy = now
        elif self._jobs and now - self._last_healthy > self.limits.no_server_timeout_s:
            reasons = "; ".join(f"{server.address}: {server.reason}" for server in self.servers)
            raise NoServerError(
                f"no server has been healthy for {self.limits.no_server_timeout_s:g} s ({reasons}); "
                "start one of them, or raise stream.no_server_timeout_s"
            )
        actions, self._outbox = self._outbox, []
        return actions

    def _probe(self, now: float) -> None:
        for index, server in enumerate(self.servers):
            if now >= server.probe_deadline:
                waited = f"no answer to a probe within {self.probe_timeout_s:g} s"
                self.probe_done(Probe(index, server.probe_serial), waited, now)
            idle = server.probe_deadline == math.inf
            if idle and now >= server.next_probe and (server.in_doubt or not server.healthy):
                server.probe_serial += 1
                server.probe_deadline = now + self.probe_timeout_s
                self._outbox.append(Probe(index, server.probe_serial))

    @property
    def probe_timeout_s(self) -> float:
        return max(2.0, self.limits.probe_s)

    def _dispatch(self, now: float) -> None:
        self.blocked = ""
        if not all(server.greeted for server in self.servers):
            self.blocked = "no server"  # a server with the wrong layout is to be found before the first request
            return
        skipped = []
        while self._waiting:
            job = self._waiting.popleft()
            server = self._pick(job)
            if server is not None:
                self._send(job, server, now)
                continue
            if now - job.held_since > self.limits.no_server_timeout_s:
                self._quarantine(job)
                continue
            skipped.append(job)
            if not job.failures:
                break  # in order: a smaller sample must not overtake for ever; a retry waits for its own servers
        self._waiting.extendleft(reversed(skipped))

    def _pick(self, job: Job) -> int | None:
        """The server with the least outstanding bytes among those that the job may go to and that have room."""
        usable = [i for i, server in enumerate(self.servers) if server.healthy and not server.in_doubt]
        fresh = [i for i in usable if i not in job.failed_on]
        if fresh or job.held_since < math.inf:
            usable = fresh
        if not usable:
            self.blocked = self.blocked or "no server"
            return None
        with_slot = [i for i in usable if self.servers[i].open_requests < self.limits.requests_per_server]
        if not with_slot:
            self.blocked = self.blocked or "requests"
            return None
        best = min(with_slot, key=lambda i: self.servers[i].outstanding)
        room = self.limits.server_credit_bytes - self.servers[best].outstanding
        if job.nbytes > min(room, self.limits.credit_bytes - self.outstanding_bytes):
            self.blocked = self.blocked or "credit"
            return None
        return best

    def _send(self, job: Job, index: int, now: float) -> None:
        server = self.servers[index]
        number = len(job.servers)
        job.servers[number] = index
        job.live += 1
        self._attempts[(job.key, number)] = Attempt(job, number, index, now + self.limits.request_timeout_s)
        server.outstanding += job.nbytes
        server.open_requests += 1
        self.issued += 1
        self._outbox.append(Send(index, job.key, number, server.life))

    # What becomes of attempts, jobs and servers.

    def _forget(self, key: Key, number: int, server: int | None = None) -> Attempt | None:
        """Gives an attempt's credit back."""
        attempt = self._attempts.get((key, number))
        if attempt is None or (server is not None and attempt.server != server):
            return None
        del self._attempts[(key, number)]
        self.servers[attempt.server].outstanding -= attempt.job.nbytes
        attempt.job.live -= 1
        return attempt

    def _finish(self, job: Job) -> None:
        del self._jobs[job.key]
        if job in self._waiting:
            self._waiting.remove(job)

    def _wanted(self, job: Job) -> bool:
        return self._jobs.get(job.key) is job

    def _doubt(self, attempt: Attempt, reason: str, now: float) -> None:
        if not self._wanted(attempt.job):
            self._forget(attempt.job.key, attempt.number)  # another attempt delivered; nobody waits for this one
            return
        server = self.servers[attempt.server]
        attempt.doubt, attempt.deadline = reason[:REASON_CHARS], math.inf
        if not server.in_doubt:
            server.in_doubt, server.next_probe = True, now

    def _failed(self, attempt: Attempt, reason: str, now: float) -> None:
        """Counts an attempt against its sample and its server."""
        job, server = attempt.job, self.servers[attempt.server]
        self._forget(job.key, attempt.number)
        server.errors += 1
        server.failed_keys.add(job.key)
        if self._wanted(job):
            job.failures.append(f"attempt {len(job.failures) + 1} at {server.address}: {reason[:REASON_CHARS]}")
            job.failed_on.add(attempt.server)
            log.info("%s failed, %s", job, job.failures[-1])
            self._retry_or_quarantine(job, now)
        if server.healthy and len(server.failed_keys) >= FAILURES_IN_A_ROW:
            self._down(attempt.server, f"{len(server.failed_keys)} samples in a row failed, the last: {reason}", now)

    def _retry_or_quarantine(self, job: Job, now: float) -> None:
        if len(job.failures) >= self.limits.attempts:
            if len(job.failed_on) > 1 or len(self.servers) == 1:
                self._quarantine(job)
                return
            job.held_since = min(job.held_since, now)
        if not job.live:
            self.retried += 1
            self._waiting.appendleft(job)

    def _quarantine(self, job: Job) -> None:
        reason = "; ".join(job.failures)
        log.warning("%s is quarantined: %s", job, reason)
        self._finish(job)
        self._outbox.append(Quarantined(job.key, reason))

    def _down(self, index: int, reason: str, now: float) -> None:
        server = self.servers[index]
        was_healthy, old_reason = server.healthy, server.reason
        server.healthy, server.in_doubt, server.reason = False, False, reason[:REASON_CHARS]
        server.next_probe = max(server.next_probe, now + self.limits.probe_s)
        server.failed_keys.clear()
        lost = self._requeue(a for a in self._attempts.values() if a.server == index)
        if was_healthy:
            server.life += 1
            server.deaths += 1
            server.since = now
            where = "go to other servers" if len(self.servers) > 1 else "wait for it"
            log.info("server %s is unhealthy: %s; %d samples %s", server.address, server.reason, lost, where)
        elif server.reason != old_reason:
            log.info("server %s is not healthy yet: %s", server.address, server.reason)

    def _ask_again(self, index: int, now: float) -> None:
        """The server lives, but what it sent while the connection was broken is lost. That does not count, unless it
        happens to the same sample again and again: then the sample may be what breaks the connection."""
        mine = [attempt for attempt in self._attempts.values() if attempt.server == index]
        for attempt in mine:
            attempt.job.breaks += 1
            if attempt.job.breaks > self.limits.attempts:
                attempt.doubt = "the data connection broke"
        lost = self._requeue(attempt for attempt in mine if attempt.job.breaks <= self.limits.attempts)
        address = self.servers[index].address
        log.info("server %s: the data connection broke; %d samples are asked for again", address, lost)

    def _requeue(self, attempts: Iterable[Attempt]) -> int:
        """Takes lost attempts back without counting them; their samples are the next to be requested, in order."""
        again = []
        for attempt in list(attempts):
            self._forget(attempt.job.key, attempt.number)
            if self._wanted(attempt.job) and not attempt.job.live and attempt.job not in self._waiting:
                again.append(attempt.job)
        self.retried += len(again)
        self._waiting.extendleft(reversed(again))
        return len(again)

    def _up(self, index: int, now: float) -> None:
        server = self.servers[index]
        if not server.healthy:
            away = "" if server.reason == "not greeted yet" else f" again after {now - server.since:.1f} s"
            log.info("server %s is healthy%s", server.address, away)
            server.healthy, server.reason, server.since = True, "", now
        server.in_doubt = False
