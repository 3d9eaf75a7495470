"""Whether a sample or a server is to blame, and what follows for both: retries, quarantine, back-off.

The rules stand in `fleet.py`; here they are carried out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

from dflash_scale.fleet.inflight import InFlight
from dflash_scale.fleet.state import Action, Attempt, Cut, Fault, Job, Limits, Quarantined, Server

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW: Final = 5  # different samples that fail with no delivery between them: then it is the server
BUSY_S: Final = 1.0
REASON_CHARS: Final = 300


class FailurePolicy:
    """Judges failed attempts and lost servers. `index` is a server's place in the list; `emit` takes the actions."""

    def __init__(
        self, servers: Sequence[Server], in_flight: InFlight, limits: Limits, emit: Callable[[Action], None]
    ) -> None:
        self._servers = servers
        self._in_flight = in_flight
        self._limits = limits
        self._emit = emit

    # An attempt failed.

    def doubt(self, attempt: Attempt, reason: str, now: float) -> None:
        """An attempt may have failed and its server may hang: a probe decides."""
        server = self._servers[attempt.server]
        if not self._in_flight.wanted(attempt.job):
            self._in_flight.abandon(attempt)  # another attempt delivered; nobody waits for this one
        elif server.retired:
            self._in_flight.requeue([attempt])
        else:
            attempt.problem, attempt.deadline = reason[:REASON_CHARS], math.inf
            if not server.in_doubt:
                server.in_doubt, server.probing.due = True, now

    def rejected(self, attempt: Attempt, fault: Fault, reason: str, now: float) -> None:
        """The server answered, and not with the sample: it refused it, has no room, or sent something else."""
        server = self._servers[attempt.server]
        attempt.problem = reason[:REASON_CHARS]
        if fault is Fault.BUSY:  # not counted against the sample
            if not server.totals.busy:
                log.info("server %s is busy: %s; from now on this is only counted", server.address, attempt.problem)
            server.totals.busy += 1
            server.paused_until = now + BUSY_S
            self._in_flight.requeue([attempt])
        elif fault is Fault.SAMPLE:
            server.totals.errors += 1
            server.failed_keys.add(attempt.job.key)
            self._blame(attempt, now)
            if server.healthy and len(server.failed_keys) >= FAILURES_IN_A_ROW:
                self._put_aside(attempt.server, f"{_in_a_row(server)}, the last: {attempt.problem}", now)
        else:
            self.failed(attempt.server, [attempt], now)

    def failed(self, index: int, attempts: Sequence[Attempt], now: float) -> None:
        """Attempts came to nothing at a server that lives: counts them against their samples, or against the server."""
        server = self._servers[index]
        for attempt in attempts:
            if not self._in_flight.wanted(attempt.job):
                self._in_flight.abandon(attempt)
        attempts = [attempt for attempt in attempts if not attempt.late]
        if not attempts:
            return
        server.totals.errors += len(attempts)
        server.failed_keys |= {attempt.job.key for attempt in attempts}
        for attempt in attempts:
            attempt.job.failed_on.add(index)
        reason = attempts[-1].problem
        if not server.proven:
            self._put_aside(index, f"{reason}, and it has delivered nothing", now)
        elif len(server.failed_keys) >= FAILURES_IN_A_ROW:
            self._put_aside(index, f"{_in_a_row(server)}, the last: {reason}", now)
        else:
            for attempt in attempts:
                server.unconfirmed.append((attempt.job, self._blame(attempt, now)))

    # The sample is to blame.

    def _blame(self, attempt: Attempt, now: float) -> str:
        """Counts an attempt against its sample; gives the reason as it is kept."""
        job, server = attempt.job, self._servers[attempt.server]
        self._in_flight.abandon(attempt)
        failure = f"attempt {len(job.failures) + 1} at {server.address}: {attempt.problem}"
        if not self._in_flight.wanted(job):
            return failure
        job.failures.append(failure)
        job.failed_on.add(attempt.server)
        job.losses += 1
        log.info("%s failed, %s", job, failure)
        if len(job.failures) >= self._limits.attempts:
            others = any(not server.retired and i not in job.failed_on for i, server in enumerate(self._servers))
            if len(job.failed_on) >= max(2, self._limits.attempts) or not others:
                self.quarantine(job)
                return failure
            job.held_since = min(job.held_since, now)
        self._in_flight.requeue([attempt])
        return failure

    def _take_back(self, job: Job, failure: str) -> None:
        """A failure that was counted was the server's fault."""
        if self._in_flight.wanted(job) and failure in job.failures:
            job.failures.remove(failure)
            if len(job.failures) < self._limits.attempts:
                job.held_since = math.inf

    def quarantine(self, job: Job) -> None:
        """The sample is given up, with all its reasons."""
        reason = "; ".join(job.failures)
        log.warning("%s is quarantined: %s", job, reason)
        self._in_flight.finish(job)
        asked = tuple(sorted({self._servers[index].address for index in job.servers.values()}))
        self._emit(Quarantined(job.key, reason, asked))

    # The server is to blame.

    def _put_aside(self, index: int, reason: str, now: float) -> None:
        """The server lives and does not deliver: what failed since its last delivery is not the samples' fault."""
        server = self._servers[index]
        for job, failure in server.unconfirmed:
            self._take_back(job, failure)
        for attempt in server.load.attempts.values():
            attempt.job.losses += not attempt.late
        self._take_out(index, reason, now)
        self._emit(Cut(index))

    def died(self, index: int, reason: str, now: float) -> None:
        """The server is gone, does not answer, or was started again."""
        for attempt in self._awaited(index):
            attempt.job.losses += 1
            attempt.job.crashes += 1
            if attempt.solo and self._in_flight.wanted(attempt.job):
                self._killed_solo(attempt, reason)
        self._take_out(index, reason, now)

    def _killed_solo(self, attempt: Attempt, reason: str) -> None:
        """A server died that had nothing but this sample; once may be chance, where there is another server to try."""
        job, server = attempt.job, self._servers[attempt.server]
        job.failed_on.add(attempt.server)
        job.solo_crashes += 1
        times = f"{job.crashes} times, now with nothing else in flight"
        job.failures.append(f"{server.address} died while it had the sample: {reason} ({times})")
        if job.solo_crashes > 1 or sum(not other.retired for other in self._servers) <= 1:
            self.quarantine(job)

    def _take_out(self, index: int, reason: str, now: float) -> None:
        """The server is not in service any more; its samples go elsewhere, and it is probed after a back-off."""
        server = self._servers[index]
        was_healthy, old_reason = server.healthy, server.reason
        server.healthy, server.in_doubt = False, False
        server.probing.deadline = math.inf  # one that is under way asks on a connection that is given up
        server.reason = server.last_fault = reason[:REASON_CHARS]
        server.failed_keys.clear()
        server.unconfirmed.clear()
        lost = self._in_flight.requeue(list(server.load.attempts.values()))
        self._in_flight.release(index)
        wait_s = self._limits.probe_s
        if was_healthy:
            server.strikes += 1
            server.life += 1
            server.totals.deaths += 1
            server.since = now
            wait_s = server.backoff(wait_s)
            where = "go to other servers" if len(self._servers) > 1 else "wait for it"
            log.info(
                "server %s is unhealthy: %s; %d samples %s; it is probed in %.3g s",
                *(server.address, server.reason, lost, where, wait_s),
            )
        elif server.reason != old_reason:
            log.info("server %s is not healthy yet: %s", server.address, server.reason)
        server.probing.due = max(server.probing.due, now + wait_s)

    # Only the connection is.

    def ask_again(self, index: int, now: float) -> None:
        """The server lives, but what it sent while the connection was broken is lost. That does not count, unless the
        sample was tried alone: then it may be what breaks the connection."""
        server = self._servers[index]
        awaited = self._awaited(index)
        for attempt in awaited:
            attempt.job.losses += 1
            attempt.job.crashes += 1
            attempt.problem = "the data connection broke" if attempt.solo else None
        lost = self._in_flight.requeue([attempt for attempt in server.load.attempts.values() if not attempt.solo])
        log.info("server %s: the data connection broke; %d samples are asked for again", server.address, lost)
        self.failed(index, [attempt for attempt in awaited if attempt.solo], now)
        self._in_flight.release(index)

    def reclaim_late(self, now: float) -> None:
        """There is no credit left: what late attempts hold is given up, with the connection they may still come by."""
        for index, server in enumerate(self._servers):
            late = server.load.late_bytes
            mostly_late = late and (not server.load.awaited or 2 * late > self._limits.server_credit_bytes)
            if mostly_late and server.healthy and not server.in_doubt:
                log.info("server %s owes %d bytes that nobody waits for: connecting anew", server.address, late)
                self._in_flight.requeue(list(server.load.attempts.values()))
                self._in_flight.release(index)
                self._emit(Cut(index))
                server.in_doubt, server.probing.due = True, now

    def _awaited(self, index: int) -> list[Attempt]:
        return [attempt for attempt in self._servers[index].load.attempts.values() if not attempt.late]


def _in_a_row(server: Server) -> str:
    return f"{len(server.failed_keys)} samples in a row failed"
