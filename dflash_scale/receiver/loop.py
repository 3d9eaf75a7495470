"""The receiver's loop: what is wanted becomes requests, and what servers send becomes samples where they are wanted.

One thread owns the fleet, the connections and the sink. A message that does not match its header, the run's layout, an
outstanding request or the data set's token ids is counted, logged at most once a minute and dropped.
"""

from __future__ import annotations

import queue
import time
from collections import defaultdict
from typing import Final

from dflash_scale.data.quarantine import QuarantineFile
from dflash_scale.fleet.fleet import Fleet
from dflash_scale.fleet.state import Action, Cut, Fault, Job, Key, Limits, Probe, Quarantined, Send
from dflash_scale.receiver.connections import Connections, Identity, Outcome, ServerConnection, ServerMismatch
from dflash_scale.receiver.delivery import Dropped, Sink, Unusable, deliver
from dflash_scale.receiver.endpoints import Endpoints
from dflash_scale.receiver.http_client import HealthAnswered, HttpClient, HttpEvent
from dflash_scale.receiver.requests import Requests
from dflash_scale.receiver.status import Status
from dflash_scale.transport import messages
from dflash_scale.transport.layout import WireError
from dflash_scale.transport.messages import Ticket
from dflash_scale.transport.sockets import Incoming

STEP_MS: Final = 10  # the reader's progress is seen by looking at it: this is how often
MESSAGES_PER_TURN: Final = 8  # from one server, before the others have theirs


class ReceiverLoop:
    """Asks the servers for what the sink wants, until there is nothing left.

    Args:
        endpoints: the servers, which may change.
        limits: bounds of the fleet.
        identity: who receives, and what.
        sink: where the samples go.
        requests: what is sent for a sample, and what may come back.
        quarantine: where samples are named that no server could answer; None: the sink does that itself.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        limits: Limits,
        identity: Identity,
        sink: Sink,
        requests: Requests,
        quarantine: QuarantineFile | None,
    ) -> None:
        self.fleet = Fleet(limits, time.monotonic())
        self.blocked_on = "servers"
        self._endpoints = endpoints
        self._identity = identity
        self._sink = sink
        self._requests = requests
        self._quarantine = quarantine
        self._dropped = Dropped()
        self._blocked_s: defaultdict[str, float] = defaultdict(float)
        self._clock = time.monotonic()
        self._max_tokens = int(requests.lengths.max())
        self._events: queue.SimpleQueue[HttpEvent] = queue.SimpleQueue()
        self._http = HttpClient(limits.request_timeout_s + 1, self._report_event)
        self._servers = Connections(identity, self._max_tokens * identity.layout.bytes_per_token, self._http)
        endpoints.poll(self._clock)
        self._join_and_leave(self._clock)

    def close(self) -> None:
        self._http.close()
        self._servers.close()

    def report(self, status: Status) -> None:
        """Writes what was asked of the servers, and what came of it, into `status`."""
        status.issued = self.fleet.issued
        status.retried = self.fleet.retried
        status.dropped = dict(self._dropped.counts)
        status.outstanding_bytes = self.fleet.outstanding_bytes
        status.blocked_on = self.blocked_on
        status.blocked_s = {what: round(seconds, 3) for what, seconds in self._blocked_s.items()}
        status.servers = [server.snapshot(self._clock) for server in self.fleet.servers]

    def step(self) -> None:
        """One turn: receive, act, send. It takes at most about STEP_MS when nothing happens.

        Raises:
            NoServerError: no server has been healthy for too long.
            ServerMismatch: before the first request: a server sends something else than what the run wants.
        """
        self._receive(0 if self._sink.backlog else STEP_MS)
        now = time.monotonic()
        if self._endpoints.poll(now):
            self._join_and_leave(now)
        for want in self._sink.take():
            self.fleet.add(want.key, want.tokens, want.nbytes)
        for action in self.fleet.poll(now):
            self._act(action)
        self._account(now)

    # Receive.

    def _receive(self, milliseconds: int) -> None:
        """Tells the fleet what happened, after at most this long."""
        news = self._servers.wait(milliseconds)
        for server in news.broken:
            self.fleet.disconnected(server.index, time.monotonic())
        for outcome in news.failed:
            self._probed(outcome)
        for server in news.readable:
            self._receive_from(server)
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, HealthAnswered):
                self._probed(self._servers.health(event))
            else:
                self.fleet.http_done(event.sent, event.fault, event.reason, time.monotonic())

    def _report_event(self, event: HttpEvent) -> None:
        """Called from the HTTP thread."""
        self._events.put(event)
        self._servers.wake()

    def _probed(self, outcome: Outcome | None) -> None:
        if outcome is None:  # not yet
            return
        if outcome.mismatch and not self.fleet.issued:
            raise ServerMismatch(outcome.problem)
        self.fleet.probe_done(outcome.probe, outcome.problem, time.monotonic(), outcome.lost)

    def _receive_from(self, server: ServerConnection) -> None:
        for _ in range(MESSAGES_PER_TURN):
            incoming = server.receive()
            if incoming is None:
                return
            try:
                self._message(server, messages.decode(incoming.header, max_tokens=self._max_tokens), incoming)
            except Unusable as error:
                self._dropped(error.reason, str(error), server.entry.name)
            except WireError as error:
                self._dropped("malformed", str(error), server.entry.name)
            incoming.skip()

    def _message(self, server: ServerConnection, message: messages.Message, incoming: Incoming) -> None:
        match message:
            case messages.HelloReply() | messages.Incompatible():
                self._probed(self._servers.replied(server, message))
            case messages.Refusal(ticket, reason, busy):
                fault, why = Fault.BUSY if busy else Fault.SAMPLE, f"refused: {reason}"
                self.fleet.rejected(server.index, _key(ticket), ticket.attempt, fault, why, time.monotonic())
            case messages.Header(ticket):
                job = self._job(server, ticket)
                if job is None:
                    raise Unusable("not outstanding", f"{_key(ticket)} attempt {ticket.attempt}")
                try:
                    deliver(incoming, message, job.key, self._sink, self._requests)
                except Unusable as error:
                    why = f"{error.reason}: {error}"
                    self.fleet.rejected(server.index, job.key, ticket.attempt, Fault.DOUBT, why, time.monotonic())
                    raise Unusable(error.reason, f"{job} attempt {ticket.attempt}: {error}") from error
                self.fleet.delivered(job, ticket.attempt, message.tokens, time.monotonic())
            case _:
                raise Unusable("malformed", f"a server does not send {type(message).__name__}")

    def _job(self, server: ServerConnection, ticket: Ticket) -> Job | None:
        if (ticket.run_id, ticket.receiver) != (self._identity.run_id, server.receiver):
            return None
        return self.fleet.claim(server.index, _key(ticket), ticket.attempt)

    # Act, and send.

    def _join_and_leave(self, now: float) -> None:
        """Makes the fleet the servers of `endpoints`. One that comes back is a new one."""
        wanted = list(self._endpoints.servers)
        for server in self._servers:
            if self.fleet.servers[server.index].retired:
                continue
            if server.entry in wanted:
                wanted.remove(server.entry)
            else:
                self.fleet.retire(server.index, now)
        free = {server.entry: server.index for server in self._servers if self.fleet.servers[server.index].gone}
        for entry in wanted:
            index = free.get(entry)
            if index is None:
                index = self.fleet.add_server(entry.name, now)
            else:  # what comes and goes is remembered once
                self.fleet.rejoin(index, now)
            self._servers.join(index, entry)

    def _act(self, action: Action) -> None:
        match action:
            case Send():
                self._send(action)
            case Probe():
                self._servers.probe(action, self.fleet.probe_timeout_s)
            case Cut(index):
                self._servers.cut(index)
            case Quarantined():
                if self._quarantine is not None:
                    self._quarantine.write(*action.key, action.reason, action.servers)
                self._sink.quarantine(action.key, action.reason)

    def _send(self, send: Send) -> None:
        epoch, sample = send.key
        server, layout = self._servers[send.server], self._sink.want(send.key).layout
        ticket = Ticket(
            run_id=self._identity.run_id,
            receiver=server.receiver,
            epoch=epoch,
            sample=sample,
            attempt=send.attempt,
            layer_ids=layout.layer_ids,
            dtype=layout.dtype,
            answer=self._requests.answers,
        )
        params = {"dflash": ticket.to_params()}
        body = {"model": server.model, **self._requests.body(sample), "kv_transfer_params": params}
        self._http.post(server.host, send, body)

    def _account(self, now: float) -> None:
        """Keeps what the stream waited for: whoever asks which half is the bottleneck finds it here."""
        self._blocked_s[self.blocked_on] += now - self._clock
        self._clock = now
        if not self._sink.attached:
            self.blocked_on = "readers"  # a rank that has not opened its ring yet
        elif self.fleet.waiting and self.fleet.blocked is not None:
            self.blocked_on = self.fleet.blocked
        elif len(self.fleet):
            self.blocked_on = "servers"
        else:
            self.blocked_on = self._sink.blocked_on


def _key(ticket: Ticket) -> Key:
    return Key(ticket.epoch, ticket.sample)
