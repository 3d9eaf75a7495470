"""Which server is asked for which sample, and what happens when the answer does not come.

`Fleet` is a state machine without sockets, threads or clocks: the receiver tells it what happened and at what time, and
carries out the actions that `poll` returns. The rules, with those of `choice.py`:

- A sample is a job from `add` until it is delivered or quarantined, exactly one of the two. It may be asked for
  several times, one attempt after the other; whichever attempt's data comes first is taken, and only once.
- An attempt holds its bytes as credit at its server until its data or a refusal comes. One that timed out goes on
  holding them ("owed"), because its data may still come. They are given back when nothing can come any more: when a
  server is put aside or its connection broke, the connection is given up (`Cut`), and the next one has another routing
  id, so that what the server still sends to the old id has no receiver. The same is done when servers owe so much
  that no credit is left.
- An attempt that a server refused counts against its sample; the next one goes to another server if there is one. After
  `Limits.attempts` of them, on as many servers (at least two) or on all that there are, the sample is quarantined with
  all reasons.
- Where sample and server cannot be told apart (bad data, a timeout, HTTP 5xx), a server that may hang is in doubt: it
  gets nothing new and is probed at once. If it answers, the attempt counts only if the server is seen to work: one that
  has delivered nothing since it was put aside, or from which FAILURES_IN_A_ROW different samples fail with no delivery
  between, is put aside, and the failures since its last delivery are taken back. It is probed after `Limits.probe_s`,
  after twice that the next time and so on, and is then on probation until it delivers.
- An attempt that was lost because its server died or was restarted, or because the connection broke, does not count. A
  sample that was in flight at `Limits.attempts` such losses is tried alone; if that kills twice, or the only server, it
  is quarantined.
- A server that says that it is busy gets nothing for BUSY_S or until it delivers; that does not count.

                 probe answered                          connection lost, probe failed,
     unhealthy ------------------> healthy ------------> failures with no delivery between
         ^  '--- probed                 ^  '-- timeout, 5xx, disconnect --> in doubt --.
         |                              '----------- probe answered -------------------|
         '-------------------------------------------- probe failed ------------------'

Servers may be added and retired at any time; an index never changes its meaning. A retired server gets nothing new,
what it owes may come until its deadline, and then its connection is closed.
"""

from __future__ import annotations

import logging
import math

from dflash_scale.stream.attempts import Attempts
from dflash_scale.stream.choice import Round, suspect
from dflash_scale.stream.faults import REASON_CHARS, Faults
from dflash_scale.stream.jobs import (
    Action,
    Cut,
    Fault,
    Job,
    Key,
    Limits,
    Lost,
    Probe,
    Send,
)
from dflash_scale.stream.servers import Pace, Server

log = logging.getLogger(__name__)


class NoServerError(RuntimeError):
    """No server has been healthy, and delivered when asked, for `Limits.no_server_timeout_s`."""


class Fleet:
    """The state machine. Times are seconds of any monotonic clock."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.servers: list[Server] = []
        self.limits = limits
        self.blocked = ""  # why the first waiting sample is not requested, see `choice.Round`
        self._attempts = Attempts(self.servers, limits)
        self._faults = Faults(self.servers, self._attempts, limits)
        self._last_healthy = now
        self._next_scan = now

    # What is wanted and how far it is.

    def add(self, key: Key, tokens: int, nbytes: int) -> None:
        """Wants one more sample of `nbytes` bytes.

        Raises:
            ValueError: the sample is larger than the credit, so it could never be requested.
        """
        self._attempts.add(key, tokens, nbytes)

    def __len__(self) -> int:
        """Samples neither delivered nor quarantined yet."""
        return len(self._attempts)

    @property
    def waiting(self) -> int:
        """Samples that no server has been asked for at the moment."""
        return len(self._attempts.waiting)

    @property
    def issued(self) -> int:
        return self._attempts.issued

    @property
    def retried(self) -> int:
        return self._attempts.retried

    @property
    def outstanding_bytes(self) -> int:
        return sum(server.outstanding for server in self.servers)

    def claim(self, server: int, key: Key, attempt: int) -> Job | None:
        """The job that data of this attempt from this server may fulfil; None when it is late, double or unknown."""
        return self._attempts.claim(server, key, attempt)

    # The servers of the fleet.

    def add_server(self, address: str, now: float) -> int:
        """One more server, to be probed first; gives its index."""
        self.servers.append(Server(address, since=now, next_probe=now))
        return len(self.servers) - 1

    def rejoin(self, index: int, now: float) -> None:
        """A removed server that is `gone` comes back, as a new one at its old index: else servers that come and go
        would be remembered each time."""
        old = self.servers[index]
        self.servers[index] = Server(
            old.address, since=now, next_probe=now, life=old.life + 1, probe_serial=old.probe_serial
        )

    def retire(self, index: int, now: float) -> None:
        """Nothing new for this server."""
        server = self.servers[index]
        server.retired, server.reason, server.since = True, "removed from the fleet", now
        log.info("server %s is removed; %d samples may still come from it", server.address, server.live)
        self._attempts.requeue([attempt for attempt in server.attempts.values() if attempt.doubt])

    # What happened.

    def delivered(self, job: Job, attempt: int, tokens: int, now: float) -> None:
        """The data of a claimed job is committed; of an answer, it has fewer tokens than credit was held for."""
        index = job.servers[attempt]
        server = self.servers[index]
        server.samples += 1
        server.tokens += tokens
        server.bytes += job.nbytes * tokens // job.tokens
        server.failed_keys.clear()
        server.unconfirmed.clear()
        server.strikes, server.paused_until = 0, -math.inf
        server.pace.delivered.append((now, tokens))
        found = self._attempts.forget(index, job.key, attempt)
        if found is not None:
            server.pace.data_s.append(now - found.sent)
        self._attempts.finish(job)

    def rejected(self, server: int, key: Key, attempt: int, fault: Fault, reason: str, now: float) -> None:
        """The server refused this attempt (SAMPLE, BUSY), or sent something else than what was asked for (DOUBT)."""
        found = self.servers[server].attempts.get((key, attempt))
        if found is None:
            return
        found.doubt = reason[:REASON_CHARS]
        if found.owed:
            self._attempts.forget(server, key, attempt)
        elif fault is Fault.BUSY:
            self._faults.busy(found, now)
        elif fault is Fault.SAMPLE:
            self._faults.refused(found, now)
        else:
            self._faults.failed(server, [found], now)
        self._attempts.forget(server, key, attempt)  # nothing more comes of it

    def http_done(self, sent: Send, fault: Fault | None, reason: str, now: float) -> None:
        """The HTTP request is over; without a fault, the data may be here already or still be on its way."""
        server = self.servers[sent.server]
        server.open_requests -= 1
        attempt = server.attempts.get((sent.key, sent.attempt))
        if fault is Fault.SERVER and sent.life == server.life and server.healthy:
            self._faults.died(sent.server, reason, now)
            self._attempts.outbox.append(Cut(sent.server))
        elif attempt is None or attempt.owed:
            return
        elif fault is None:
            server.pace.http_s.append(now - attempt.sent)
            attempt.deadline = math.inf if attempt.doubt else now + self.limits.request_timeout_s
        elif fault in (Fault.SAMPLE, Fault.BUSY):
            self.rejected(sent.server, sent.key, sent.attempt, fault, reason, now)
        else:
            self._faults.doubt(attempt, reason, now)

    def disconnected(self, server: int, now: float) -> None:
        """The data connection to the server broke; it is given up as for `Cut`."""
        state = self.servers[server]
        if state.retired:
            self._attempts.requeue(list(state.attempts.values()))
        elif state.probe_deadline < math.inf:  # the answer can no longer come
            self.probe_done(Probe(server, state.probe_serial), "the data connection broke", now)
        elif state.healthy and not state.in_doubt:
            state.in_doubt, state.next_probe = True, now

    def probe_done(self, probe: Probe, problem: str, now: float, lost: Lost = Lost.NOTHING) -> None:
        """A probe ended. `problem` is empty when the server answered on both ports; `lost` says whether what was asked
        of it before the probe can still come."""
        server = self.servers[probe.server]
        if probe.serial != server.probe_serial or server.probe_deadline == math.inf or server.retired:
            return  # the answer to a probe that was given up
        server.greeted, server.probe_deadline, server.next_probe = True, math.inf, now + self.limits.probe_s
        if problem:
            self._faults.died(probe.server, problem, now)
            self._attempts.outbox.append(Cut(probe.server))
            return
        if server.healthy and lost is Lost.RESTARTED:
            self._faults.died(probe.server, "it was restarted", now)
        elif server.healthy and lost is Lost.CONNECTION:
            self._faults.ask_again(probe.server, now)
            if not server.healthy:  # it was put aside for that, and the new connection is given up as well
                return
        server.in_doubt = False
        if not server.healthy:
            away = "" if server.reason == "not greeted yet" else f" again after {now - server.since:.1f} s"
            log.info("server %s is healthy%s", server.address, away)
            server.healthy, server.reason, server.since = True, "", now
        self._faults.failed(probe.server, [attempt for attempt in server.attempts.values() if attempt.doubt], now)

    # What to do.

    def poll(self, now: float) -> list[Action]:
        """The actions that are due. Call it after every event, and at least a few times a second.

        Raises:
            NoServerError: samples are wanted, and no server has been healthy for too long.
        """
        if now >= self._next_scan:
            self._next_scan = now + min(0.25, self.limits.request_timeout_s / 10)
            for server in self.servers:
                for attempt in [attempt for attempt in server.attempts.values() if now >= attempt.deadline]:
                    self._faults.doubt(attempt, f"no data within {self.limits.request_timeout_s:g} s", now)
        self._probe(now)
        self._dispatch(now)
        self._close_retired()
        in_service = [server for server in self.servers if not server.retired]
        if not self._attempts or any(server.healthy and not server.strikes for server in in_service):
            self._last_healthy = now
        elif now - self._last_healthy > self.limits.no_server_timeout_s:
            reasons = "; ".join(f"{server.address}: {server.reason or server.fault}" for server in in_service)
            raise NoServerError(
                f"no server has been healthy for {self.limits.no_server_timeout_s:g} s ({reasons or 'none is named'}); "
                "start one of them, or raise stream.no_server_timeout_s"
            )
        actions, self._attempts.outbox = self._attempts.outbox, []
        return actions

    def _probe(self, now: float) -> None:
        for index, server in enumerate(self.servers):
            if server.retired:
                continue
            if now >= server.probe_deadline:
                waited = f"no answer to a probe within {self.probe_timeout_s:g} s"
                self.probe_done(Probe(index, server.probe_serial), waited, now)
            idle = server.probe_deadline == math.inf
            if idle and now >= server.next_probe and (server.in_doubt or not server.healthy):
                server.probe_serial += 1
                server.probe_deadline = now + self.probe_timeout_s
                self._attempts.outbox.append(Probe(index, server.probe_serial))

    @property
    def probe_timeout_s(self) -> float:
        return max(2.0, self.limits.probe_s)

    def _dispatch(self, now: float) -> None:
        self.blocked = ""
        if not self.issued and not all(server.greeted or server.retired for server in self.servers):
            self.blocked = "no server"  # a server with the wrong layout is to be found before the first request
            return
        waiting = self._attempts.waiting
        choice = Round(self.servers, self.limits, waiting, now)
        # With the least trouble first: on probation a server takes no other, so that one could keep the rest from it.
        first = min((job for job in waiting if suspect(job, self.limits)), key=lambda job: job.troubles, default=None)
        if first is not None and (server := choice.place_alone(first)) is not None:
            waiting.remove(first)
            self._attempts.send(first, server, now, alone=True)
        skipped = []
        while waiting:
            job = waiting.popleft()
            if suspect(job, self.limits):
                skipped.append(job)
                continue
            server = choice.place(job)
            if server is not None:
                self._attempts.send(job, server, now)
                continue
            if now - job.held_since > self.limits.no_server_timeout_s:
                self._attempts.quarantine(job)
                continue
            skipped.append(job)
            if not (job.failed_on or choice.picky):
                break  # in order: a smaller sample must not overtake for ever; a retry waits for its own servers
        waiting.extendleft(reversed(skipped))
        self.blocked = choice.blocked or ("requests" if waiting else "")
        if self.blocked == "credit":
            self._faults.collect_debts(now)

    def _close_retired(self) -> None:
        for index, server in enumerate(self.servers):
            if server.retired and not server.closed and not server.live:
                self._attempts.release(index)
                server.healthy, server.closed, server.pace = False, True, Pace()
                self._attempts.outbox.append(Cut(index))
