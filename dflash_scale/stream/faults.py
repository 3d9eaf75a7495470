"""What the end of an attempt, and a fault of a server, mean for the server and for what was asked of it.

The rules stand in `fleet.py`; here is their judgement: whether a sample or a server is to blame.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Final

from dflash_scale.stream.attempts import Attempts
from dflash_scale.stream.jobs import Attempt, Cut, Limits
from dflash_scale.stream.servers import Server

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW: Final = 5  # different samples that fail with no delivery between them: then it is the server
BUSY_S: Final = 1.0
REASON_CHARS: Final = 300


class Faults:
    """Judges the servers of a fleet. `index` is a server's place in the list."""

    def __init__(self, servers: Sequence[Server], attempts: Attempts, limits: Limits) -> None:
        self._servers, self._attempts, self._limits = servers, attempts, limits

    def doubt(self, attempt: Attempt, reason: str, now: float) -> None:
        """An attempt may have failed and its server may hang: a probe decides."""
        server = self._servers[attempt.server]
        if not self._attempts.wanted(attempt.job):
            self._attempts.let_go(attempt)  # another attempt delivered; nobody waits for this one
        elif server.retired:
            self._attempts.requeue([attempt])
        else:
            attempt.doubt, attempt.deadline = reason[:REASON_CHARS], math.inf
            if not server.in_doubt:
                server.in_doubt, server.next_probe = True, now

    def busy(self, attempt: Attempt, now: float) -> None:
        """The server has no room now; whatever the sample, it does not pay for that."""
        server = self._servers[attempt.server]
        if not server.busy:
            log.info("server %s is busy: %s; from now on this is only counted", server.address, attempt.doubt)
        server.busy += 1
        server.paused_until = now + BUSY_S
        self._attempts.requeue([attempt])

    def refused(self, attempt: Attempt, now: float) -> None:
        """The server answered that it will not send this sample."""
        server = self._servers[attempt.server]
        server.errors += 1
        server.failed_keys.add(attempt.job.key)
        self._attempts.blame(attempt, now)
        if server.healthy and len(server.failed_keys) >= FAILURES_IN_A_ROW:
            self.put_aside(attempt.server, f"{_in_a_row(server)}, the last: {attempt.doubt}", now)

    def failed(self, index: int, attempts: Sequence[Attempt], now: float) -> None:
        """Attempts came to nothing at a server that lives: counts them against their samples, or against the server."""
        server = self._servers[index]
        for attempt in attempts:
            if not self._attempts.wanted(attempt.job):
                self._attempts.let_go(attempt)
        attempts = [attempt for attempt in attempts if not attempt.owed]
        if not attempts:
            return
        server.errors += len(attempts)
        server.failed_keys |= {attempt.job.key for attempt in attempts}
        for attempt in attempts:
            attempt.job.failed_on.add(index)
        reason = attempts[-1].doubt
        if not server.proven:
            self.put_aside(index, f"{reason}, and it has delivered nothing", now)
        elif len(server.failed_keys) >= FAILURES_IN_A_ROW:
            self.put_aside(index, f"{_in_a_row(server)}, the last: {reason}", now)
        else:
            for attempt in attempts:
                server.unconfirmed.append((attempt.job, self._attempts.blame(attempt, now)))

    def put_aside(self, index: int, reason: str, now: float) -> None:
        """The server lives and does not deliver: what failed since its last delivery is not the samples' fault."""
        server = self._servers[index]
        for job, failure in server.unconfirmed:
            self._attempts.take_back(job, failure)
        for attempt in server.attempts.values():
            attempt.job.troubles += not attempt.owed
        self._down(index, reason, now)
        self._attempts.outbox.append(Cut(index))

    def died(self, index: int, reason: str, now: float) -> None:
        """The server is gone, or does not answer."""
        server = self._servers[index]
        for attempt in [attempt for attempt in server.attempts.values() if not attempt.owed]:
            attempt.job.troubles += 1
            attempt.job.losses += 1
            if attempt.alone and self._attempts.wanted(attempt.job):
                self._killed_alone(attempt, reason)
        self._down(index, reason, now)

    def _killed_alone(self, attempt: Attempt, reason: str) -> None:
        """A server died that had nothing but this sample; once may be chance, where there is another server to try."""
        job, server = attempt.job, self._servers[attempt.server]
        job.failed_on.add(attempt.server)
        job.killed += 1
        times = f"{job.losses} times, now with nothing else in flight"
        job.failures.append(f"{server.address} died while it had the sample: {reason} ({times})")
        if job.killed > 1 or sum(not other.retired for other in self._servers) <= 1:
            self._attempts.quarantine(job)

    def _down(self, index: int, reason: str, now: float) -> None:
        server = self._servers[index]
        was_healthy, old_reason = server.healthy, server.reason
        server.healthy, server.in_doubt = False, False
        server.probe_deadline = math.inf  # one that is under way asks on a connection that is given up
        server.reason = server.fault = reason[:REASON_CHARS]
        server.failed_keys.clear()
        server.unconfirmed.clear()
        lost = self._attempts.requeue(list(server.attempts.values()))
        self._attempts.release(index)
        wait_s = self._limits.probe_s
        if was_healthy:
            server.strikes += 1
            server.life += 1
            server.deaths += 1
            server.since = now
            wait_s = server.backoff(wait_s)
            where = "go to other servers" if len(self._servers) > 1 else "wait for it"
            log.info(
                "server %s is unhealthy: %s; %d samples %s; it is probed in %.3g s",
                *(server.address, server.reason, lost, where, wait_s),
            )
        elif server.reason != old_reason:
            log.info("server %s is not healthy yet: %s", server.address, server.reason)
        server.next_probe = max(server.next_probe, now + wait_s)

    def ask_again(self, index: int, now: float) -> None:
        """The server lives, but what it sent while the connection was broken is lost. That does not count, unless the
        sample was alone: then it may be what breaks the connection."""
        server = self._servers[index]
        alone = []
        for attempt in [attempt for attempt in server.attempts.values() if not attempt.owed]:
            attempt.job.troubles += 1
            attempt.job.losses += 1
            attempt.doubt = "the data connection broke" if attempt.alone else ""
            alone += [attempt] if attempt.alone else []
        lost = self._attempts.requeue([attempt for attempt in server.attempts.values() if not attempt.alone])
        log.info("server %s: the data connection broke; %d samples are asked for again", server.address, lost)
        self.failed(index, alone, now)
        self._attempts.release(index)

    def collect_debts(self, now: float) -> None:
        """There is no credit left: what servers owe is given up, with the connection that it may still come by."""
        for index, server in enumerate(self._servers):
            useless = server.owed and (not server.live or 2 * server.owed > self._limits.server_credit_bytes)
            if useless and server.healthy and not server.in_doubt:
                log.info("server %s owes %d bytes that nobody waits for: connecting anew", server.address, server.owed)
                self._attempts.requeue(list(server.attempts.values()))
                self._attempts.release(index)
                self._attempts.outbox.append(Cut(index))
                server.in_doubt, server.next_probe = True, now


def _in_a_row(server: Server) -> str:
    return f"{len(server.failed_keys)} samples in a row failed"
