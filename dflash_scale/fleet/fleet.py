"""Which server is asked for which sample, and what happens when the answer does not come.

`Fleet` is a state machine without sockets, threads or clocks: the receiver tells it what happened and at what time, and
carries out the actions that `poll` returns. It sorts what it is told; whether a sample or a server is to blame is
decided in `failures.py`, which server is asked in `routing.py`, and `inflight.py` keeps the accounts. The rules:

- A sample is a job from `add` until it is delivered or quarantined, exactly one of the two. It may be asked for
  several times, one attempt after the other; whichever attempt's data comes first is taken, and only once.
- An attempt holds its bytes as credit at its server until its data or a refusal comes. One that timed out goes on
  holding them (it is "late"), because its data may still come. They are given back when nothing can come any more:
  when a server is put aside or its connection broke, the connection is given up (`Cut`), and the next one has another
  routing id, so that what the server still sends to the old id has no receiver. The same is done when late attempts
  hold so much that no credit is left.
- An attempt that a server refused counts against its sample; the next one goes to another server if there is one. After
  `Limits.attempts` of them, on as many servers (at least two) or on all that there are, the sample is quarantined with
  all reasons.
- Where sample and server cannot be told apart (bad data, a timeout, HTTP 5xx), a server that may hang is in doubt: it
  gets nothing new and is probed at once. If it answers, the attempt counts only if the server is seen to work: one that
  has delivered nothing since it was put aside, or from which FAILURES_IN_A_ROW different samples fail with no delivery
  between, is put aside, and the failures since its last delivery are taken back. It is probed after `Limits.probe_s`,
  after twice that the next time and so on, and is then on probation until it delivers.
- An attempt that was lost because its server died or was restarted, or because the connection broke, does not count. A
  sample that was in flight at `Limits.attempts` of these is tried alone; if that kills twice, or the only server, it
  is quarantined.
- A server that says that it is busy gets nothing for BUSY_S or until it delivers; that does not count.

                 probe answered                          connection lost, probe failed,
     unhealthy ------------------> healthy ------------> failures with no delivery between
         ^  '--- probed                 ^  '-- timeout, 5xx, disconnect --> in doubt --.
         |                              '----------- probe answered -------------------|
         '-------------------------------------------- probe failed ------------------'

Servers may be added and retired at any time; an index never changes its meaning. A retired server gets nothing new,
what it was asked for may come until its deadline, and then its connection is closed.
"""

from __future__ import annotations

import logging
import math

from dflash_scale.fleet.failures import FailurePolicy
from dflash_scale.fleet.inflight import InFlight
from dflash_scale.fleet.routing import Round, may_be_poison
from dflash_scale.fleet.state import Action, Cut, Fault, Job, Key, Limits, Lost, Pace, Probe, Probing, Send, Server

log = logging.getLogger(__name__)


class NoServerError(RuntimeError):
    """No server has been healthy, and delivered when asked, for `Limits.no_server_timeout_s`."""


class Fleet:
    """The state machine. Times are seconds of any monotonic clock.

    Attributes:
        servers: by index; for reading only.
        blocked: why the first waiting sample is not requested, see `routing.Round`; None if it is.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self.servers: list[Server] = []
        self.blocked: str | None = None
        self._limits = limits
        self._outbox: list[Action] = []  # in the order in which they are to be carried out
        self._in_flight = InFlight(self.servers, limits)
        self._failures = FailurePolicy(self.servers, self._in_flight, limits, self._outbox.append)
        self._last_healthy = now
        self._next_scan = now

    # What is wanted and how far it is.

    def add(self, key: Key, tokens: int, nbytes: int) -> None:
        """Wants one more sample of `nbytes` bytes.

        Raises:
            ValueError: the sample is larger than the credit, so it could never be requested.
        """
        self._in_flight.add(key, tokens, nbytes)

    def __len__(self) -> int:
        """Samples neither delivered nor quarantined yet."""
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """Samples that no server has been asked for at the moment."""
        return len(self._in_flight.waiting)

    @property
    def issued(self) -> int:
        return self._in_flight.issued

    @property
    def retried(self) -> int:
        return self._in_flight.retried

    @property
    def outstanding_bytes(self) -> int:
        return sum(server.load.outstanding_bytes for server in self.servers)

    @property
    def probe_timeout_s(self) -> float:
        return max(2.0, self._limits.probe_s)

    def claim(self, server: int, key: Key, attempt: int) -> Job | None:
        """The job that data of this attempt from this server may fulfil; None when it is late, double or unknown."""
        return self._in_flight.claim(server, key, attempt)

    # The servers of the fleet.

    def add_server(self, address: str, now: float) -> int:
        """One more server, to be probed first; gives its index."""
        self.servers.append(Server(address, since=now, probing=Probing(due=now)))
        return len(self.servers) - 1

    def rejoin(self, index: int, now: float) -> None:
        """A removed server that is `gone` comes back, as a new one: its index is used again, so that the list does not
        grow with servers that come and go."""
        old = self.servers[index]
        probing = Probing(due=now, serial=old.probing.serial)
        self.servers[index] = Server(old.address, since=now, probing=probing, life=old.life + 1)

    def retire(self, index: int, now: float) -> None:
        """Nothing new for this server."""
        server = self.servers[index]
        server.retired, server.reason, server.since = True, "removed from the fleet", now
        log.info("server %s is removed; %d samples may still come from it", server.address, server.load.awaited)
        self._in_flight.requeue(server.load.doubtful())

    # What happened.

    def delivered(self, job: Job, attempt: int, tokens: int, now: float) -> None:
        """The data of a claimed job is committed; of an answer, it has fewer tokens than credit was held for."""
        index = job.servers[attempt]
        server = self.servers[index]
        server.totals.samples += 1
        server.totals.tokens += tokens
        server.totals.bytes += job.nbytes * tokens // job.tokens
        server.failed_keys.clear()
        server.unconfirmed.clear()
        server.strikes, server.paused_until = 0, -math.inf
        server.pace.delivered.append((now, tokens))
        found = self._in_flight.forget(index, job.key, attempt)
        if found is not None:
            server.pace.data_s.append(now - found.sent)
        self._in_flight.finish(job)

    def rejected(self, server: int, key: Key, attempt: int, fault: Fault, reason: str, now: float) -> None:
        """The server refused this attempt (SAMPLE, BUSY), or sent something else than what was asked for (DOUBT)."""
        found = self.servers[server].load.attempts.get((key, attempt))
        if found is None:
            return
        if not found.late:
            self._failures.rejected(found, fault, reason, now)
        self._in_flight.forget(server, key, attempt)  # nothing more comes of it

    def http_done(self, sent: Send, fault: Fault | None, reason: str, now: float) -> None:
        """The HTTP request is over; without a fault, the data may be here already or still be on its way."""
        server = self.servers[sent.server]
        server.load.open_requests -= 1
        attempt = server.load.attempts.get((sent.key, sent.attempt))
        if fault is Fault.SERVER and sent.life == server.life and server.healthy:
            self._failures.died(sent.server, reason, now)
            self._outbox.append(Cut(sent.server))
        elif attempt is None or attempt.late:
            return
        elif fault is None:
            server.pace.http_s.append(now - attempt.sent)
            attempt.deadline = now + self._limits.request_timeout_s if attempt.problem is None else math.inf
        elif fault in (Fault.SAMPLE, Fault.BUSY):
            self.rejected(sent.server, sent.key, sent.attempt, fault, reason, now)
        else:
            self._failures.doubt(attempt, reason, now)

    def disconnected(self, server: int, now: float) -> None:
        """The data connection to the server broke; it is given up as for `Cut`."""
        state = self.servers[server]
        if state.retired:
            self._in_flight.requeue(list(state.load.attempts.values()))
        elif state.probing.under_way:  # the answer can no longer come
            self.probe_done(Probe(server, state.probing.serial), "the data connection broke", now)
        elif state.healthy and not state.in_doubt:
            state.in_doubt, state.probing.due = True, now

    def probe_done(self, probe: Probe, problem: str | None, now: float, lost: Lost = Lost.NOTHING) -> None:
        """A probe ended. Without a `problem` the server answered on both ports; `lost` says whether what was asked of
        it before the probe can still come."""
        server = self.servers[probe.server]
        if probe.serial != server.probing.serial or not server.probing.under_way or server.retired:
            return  # the answer to a probe that was given up
        first = not server.probing.tried
        server.probing.tried = True
        server.probing.deadline = math.inf
        server.probing.due = now + self._limits.probe_s
        if problem:
            self._failures.died(probe.server, problem, now)
            self._outbox.append(Cut(probe.server))
            return
        if server.healthy and lost is Lost.RESTARTED:
            self._failures.died(probe.server, "it was restarted", now)
        elif server.healthy and lost is Lost.CONNECTION:
            self._failures.ask_again(probe.server, now)
            if not server.healthy:  # it was put aside for that, and the new connection is given up as well
                return
        server.in_doubt = False
        if not server.healthy:
            away = "" if first else f" again after {now - server.since:.1f} s"
            log.info("server %s is healthy%s", server.address, away)
            server.healthy, server.reason, server.since = True, None, now
        self._failures.failed(probe.server, server.load.doubtful(), now)

    # What to do.

    def poll(self, now: float) -> list[Action]:
        """The actions that are due. Call it after every event, and at least a few times a second.

        Raises:
            NoServerError: samples are wanted, and no server has been healthy for too long.
        """
        if now >= self._next_scan:
            self._next_scan = now + min(0.25, self._limits.request_timeout_s / 10)
            self._time_out(now)
        self._probe(now)
        self._dispatch(now)
        self._close_retired()
        self._check_health(now)
        actions = list(self._outbox)
        self._outbox.clear()
        return actions

    def _time_out(self, now: float) -> None:
        for server in self.servers:
            for attempt in [attempt for attempt in server.load.attempts.values() if now >= attempt.deadline]:
                self._failures.doubt(attempt, f"no data within {self._limits.request_timeout_s:g} s", now)

    def _probe(self, now: float) -> None:
        for index, server in enumerate(self.servers):
            if server.retired:
                continue
            probing = server.probing
            if now >= probing.deadline:
                waited = f"no answer to a probe within {self.probe_timeout_s:g} s"
                self.probe_done(Probe(index, probing.serial), waited, now)
            if not probing.under_way and now >= probing.due and (server.in_doubt or not server.healthy):
                probing.serial += 1
                probing.deadline = now + self.probe_timeout_s
                self._outbox.append(Probe(index, probing.serial))

    def _dispatch(self, now: float) -> None:
        """Requests the waiting samples in their order, as far as servers take them."""
        self.blocked = None
        if not self.issued and not all(server.probing.tried or server.retired for server in self.servers):
            self.blocked = "no server"  # a server with the wrong layout is to be found before the first request
            return
        waiting = self._in_flight.waiting
        routing = Round(self.servers, self._limits, waiting, now)
        # Poison first: the server that is emptied for it must not be filled again by the samples below. Of several, the
        # one with the fewest losses: on probation a server takes no other, so another one could keep the rest from it.
        poison = (job for job in waiting if may_be_poison(job, self._limits))
        first = min(poison, key=lambda job: job.losses, default=None)
        if first is not None and (server := routing.place_solo(first)) is not None:
            waiting.remove(first)
            self._outbox.append(self._in_flight.send(first, server, now, solo=True))
        skipped = []
        while waiting:
            job = waiting.popleft()
            if may_be_poison(job, self._limits):
                skipped.append(job)  # its turn, alone, comes in a later round
                continue
            server = routing.place(job)
            if server is not None:
                self._outbox.append(self._in_flight.send(job, server, now))
                continue
            # Held: it has failed often enough, but not on enough servers, and the one it waits for does not come.
            if now - job.held_since > self._limits.no_server_timeout_s:
                self._failures.quarantine(job)
                continue
            skipped.append(job)
            # The first job that finds no room ends the round, since smaller ones behind it would take every byte that
            # comes free, and it would wait for ever. But one that waits for particular servers (a retry for those it
            # has not failed on, one with many losses for those not on probation) does not hold up the rest.
            if not (job.failed_on or routing.kept_from_probation):
                break
        waiting.extendleft(reversed(skipped))
        self.blocked = routing.blocked or ("requests" if waiting else None)
        if self.blocked == "credit":
            self._failures.reclaim_late(now)

    def _close_retired(self) -> None:
        for index, server in enumerate(self.servers):
            if server.retired and not server.closed and not server.load.awaited:
                self._in_flight.release(index)
                server.healthy, server.closed = False, True
                server.pace = Pace()
                self._outbox.append(Cut(index))

    def _check_health(self, now: float) -> None:
        members = [server for server in self.servers if not server.retired]
        timeout_s = self._limits.no_server_timeout_s
        if not self._in_flight or any(server.healthy and not server.strikes for server in members):
            self._last_healthy = now
        elif now - self._last_healthy > timeout_s:
            reasons = "; ".join(f"{server.address}: {server.reason or server.last_fault}" for server in members)
            raise NoServerError(
                f"no server has been healthy for {timeout_s:g} s ({reasons or 'none is named'}); "
                "start one of them, or raise stream.no_server_timeout_s"
            )
