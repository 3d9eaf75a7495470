"""The receiver's loop: rows that may be fetched become requests, and what the servers send becomes records in rings.

One thread owns the fleet, the sockets and the rings. Payloads go from ZeroMQ's message straight into the ring's slot;
no other copy is made. A message that does not match its header, the run's layout, an outstanding request or the data
set's token ids is counted, logged at most once a minute and dropped.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter, defaultdict
from typing import Final, Protocol

import zmq

from dflash_scale.config_stream import Server, StreamSection
from dflash_scale.quarantine import QuarantineFile
from dflash_scale.receiver.status import ServerStatus, Status
from dflash_scale.stream import payload, wire
from dflash_scale.stream.calls import Calls, Event, HealthAnswered
from dflash_scale.stream.endpoints import Endpoints
from dflash_scale.stream.fleet import Fleet
from dflash_scale.stream.greetings import Comparison, Greeting, Identity, ServerMismatch
from dflash_scale.stream.jobs import Action, Cut, Fault, Job, Key, Limits, Lost, Probe, Quarantined, Send
from dflash_scale.stream.links import Links
from dflash_scale.stream.questions import Questions
from dflash_scale.stream.window import Want
from dflash_scale.stream.wire import Ticket, WireError

log = logging.getLogger(__name__)

STEP_MS: Final = 10  # the reader's progress is seen by looking at it: this is how often
MESSAGES_PER_TURN: Final = 8  # from one server, before the others have theirs
LOG_EVERY_S: Final = 60.0


def limits_of(stream: StreamSection) -> Limits:
    """The bounds of asking the servers."""
    return Limits(
        credit_bytes=stream.credit_bytes,
        server_credit_bytes=stream.server_credit_bytes,
        requests_per_server=stream.requests_per_server,
        request_timeout_s=stream.request_timeout_s,
        attempts=stream.attempts,
        probe_s=stream.probe_s,
        no_server_timeout_s=stream.no_server_timeout_s,
    )


class Destination(Protocol):
    """Where samples go, and which ones: `delivery.Delivery` says what the members do."""

    attached: bool

    @property
    def complete(self) -> bool: ...
    @property
    def backlog(self) -> bool: ...
    @property
    def blocked_on(self) -> str: ...
    def take(self) -> list[Want]: ...
    def want(self, key: Key) -> Want: ...
    def reserve(self, key: Key) -> memoryview | None: ...
    def abandon(self, key: Key) -> None: ...
    def commit(self, key: Key, token_ids: bytes) -> None: ...
    def quarantine(self, key: Key, reason: str) -> None: ...


class Dropped:
    """Counts messages that are thrown away, and says so at most once a minute per reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._said: dict[str, tuple[float, int]] = {}

    def __call__(self, reason: str, detail: str, server: str) -> None:
        self.counts[reason] += 1
        when, count = self._said.get(reason, (-LOG_EVERY_S, 0))
        if time.monotonic() - when >= LOG_EVERY_S:
            self._said[reason] = time.monotonic(), self.counts[reason]
            log.warning(
                "dropped %d message(s), %s; the last from %s: %s", self.counts[reason] - count, reason, server, detail
            )


class Intake:
    """Feeds the rings of one node until every row is delivered.

    Args:
        endpoints: the servers, which may change.
        limits: bounds of the fleet.
        identity: who receives, and what.
        delivery: where the samples go.
        questions: what is sent for a sample, and what may come back.
        quarantine: where samples are named that no server could answer; None: `delivery` does that itself.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        limits: Limits,
        identity: Identity,
        delivery: Destination,
        questions: Questions,
        quarantine: QuarantineFile | None,
    ) -> None:
        self._identity, self.delivery, self._questions, self._quarantine = identity, delivery, questions, quarantine
        self.fleet = Fleet(limits, time.monotonic())
        self._endpoints = endpoints
        self._servers: list[Server] = []  # as configured; of every server of the fleet
        self.dropped = Dropped()
        self.blocked_on = "servers"
        self.blocked_s: defaultdict[str, float] = defaultdict(float)
        self._clock = time.monotonic()
        self._max_tokens = int(questions.lengths.max())
        self._greetings: dict[int, Greeting] = {}
        self._server_ids: dict[int, str] = {}
        self._models: dict[int, str] = {}
        self._comparison = Comparison(identity)
        self._broken: set[int] = set()  # servers whose data connection broke since their last greeting
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._calls = Calls(limits.requests_per_server, limits.request_timeout_s + 1, self._report)
        largest = self._max_tokens * identity.layout.bytes_per_token
        self._links = Links(identity.receiver, largest, identity.keys)
        endpoints.look(self._clock)
        self._join_and_leave()

    def close(self) -> None:
        self._calls.close()
        self._links.close()

    def report(self, status: Status) -> None:
        """Writes what was asked of the servers, and what came of it, into `status`."""
        status.issued = self.fleet.issued
        status.retried = self.fleet.retried
        status.dropped = dict(self.dropped.counts)
        status.outstanding_bytes = self.fleet.outstanding_bytes
        status.blocked_on = self.blocked_on
        status.blocked_s = {what: round(seconds, 3) for what, seconds in self.blocked_s.items()}
        status.servers = [ServerStatus(**server.snapshot(self._clock)) for server in self.fleet.servers]

    def step(self) -> None:
        """One turn of the loop, at most about STEP_MS long when nothing happens.

        Raises:
            NoServerError: no server has been healthy for too long.
            ServerMismatch: before the first request: a server sends something else than what the run wants.
        """
        now = time.monotonic()
        if self._endpoints.look(now):
            self._join_and_leave()
        for want in self.delivery.take():
            self.fleet.add(want.key, want.tokens, want.nbytes)
        for action in self.fleet.poll(now):
            self._act(action)
        self._account(now)
        seen = self._links.wait(0 if self.delivery.backlog else STEP_MS)
        for server in seen.broken:
            self._broken.add(server)
            self._greetings.pop(server, None)
            self.fleet.disconnected(server, time.monotonic())
        for server, why in seen.shut.items():
            if (greeting := self._greetings.pop(server, None)) is not None:
                self.fleet.probe_done(greeting.probe, f"no data connection: {why}", time.monotonic())
        for server in seen.readable:
            self._receive(server)
        while not self._events.empty():
            self._happened(self._events.get())

    def _join_and_leave(self) -> None:
        """Makes the fleet the servers of `endpoints`. One that comes back is a new one."""
        now, wanted = time.monotonic(), list(self._endpoints.servers)
        for index, server in enumerate(self._servers):
            if self.fleet.servers[index].retired:
                continue
            if server in wanted:
                wanted.remove(server)
            else:
                self.fleet.retire(index, now)
        free = {server: index for index, server in enumerate(self._servers) if self.fleet.servers[index].gone}
        for server in wanted:
            if server in free:  # its old index: what comes and goes is remembered once
                self._calls.renew(free[server])
                self.fleet.rejoin(free[server], now)
            else:
                self._servers.append(server)
                self._calls.add(server.http, server.data_parallel_rank)
                self.fleet.add_server(server.name, now)

    def _report(self, event: Event) -> None:
        """Called from the HTTP threads."""
        self._events.put(event)
        self._links.wake()

    def _account(self, now: float) -> None:
        """Keeps what the stream waited for: whoever asks which half is the bottleneck finds it here."""
        self.blocked_s[self.blocked_on] += now - self._clock
        self._clock = now
        if not self.delivery.attached:
            self.blocked_on = "readers"  # a rank that has not opened its ring yet
        elif self.fleet.waiting:
            self.blocked_on = self.fleet.blocked
        elif len(self.fleet):
            self.blocked_on = "servers"
        else:
            self.blocked_on = self.delivery.blocked_on

    # Actions of the fleet, and what becomes of them.

    def _act(self, action: Action) -> None:
        match action:
            case Send():
                self._send(action)
            case Probe():
                self._probe(action)
            case Cut(server):
                self._links.cut(server)
                if self.fleet.servers[server].closed:
                    self._calls.drop(server)
            case Quarantined():
                if self._quarantine is not None:
                    self._quarantine.write(*action.key, action.reason, action.servers)
                self.delivery.quarantine(action.key, action.reason)

    def _probe(self, probe: Probe) -> None:
        server = probe.server
        self._greetings[server] = Greeting(probe)
        socket = self._links.socket(server)
        if socket is None:
            socket = self._links.connect(server, self._servers[server].zmq)
        self._calls.health(probe, self.fleet.probe_timeout_s)
        try:
            socket.send(wire.encode(wire.Hello(self._identity.run_id, self._links.receiver(server))), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("hellos to %s wait already", self.fleet.servers[server].address)

    def _send(self, send: Send) -> None:
        epoch, sample = send.key
        layout = self.delivery.want(send.key).layout
        receiver = self._links.receiver(send.server)
        ticket = Ticket(
            self._identity.run_id,
            receiver,
            epoch,
            sample,
            send.attempt,
            layout.layer_ids,
            layout.dtype,
            self._questions.answers,
        )
        params = {"dflash": ticket.to_params()}
        body = {"model": self._models[send.server], **self._questions.body(sample), "kv_transfer_params": params}
        self._calls.post(send, body)

    def _happened(self, event: Event) -> None:
        if isinstance(event, HealthAnswered):
            greeting = self._greetings.get(event.probe.server)
            if greeting is None or greeting.probe != event.probe:
                return
            if event.problem:
                self.fleet.probe_done(event.probe, event.problem, time.monotonic())
            else:
                greeting.health = True
                self._greeted(greeting)
        else:
            self.fleet.http_done(event.sent, event.fault, event.reason, time.monotonic())

    def _greeted(self, greeting: Greeting) -> None:
        if not greeting.health or greeting.reply is None:
            return
        server, reply = greeting.probe.server, greeting.reply
        del self._greetings[server]
        mismatch = self._comparison.problem(self._servers[server], reply)
        if mismatch and not self.fleet.issued:
            raise ServerMismatch(mismatch)
        if isinstance(reply, wire.Incompatible):
            self.fleet.probe_done(greeting.probe, mismatch, time.monotonic())
            return
        lost = Lost.CONNECTION if server in self._broken else Lost.NOTHING
        if self._server_ids.get(server, reply.server_id) != reply.server_id:
            lost = Lost.RESTARTED
        self._broken.discard(server)
        self._server_ids[server], self._models[server] = reply.server_id, reply.model
        self.fleet.probe_done(greeting.probe, mismatch, time.monotonic(), lost)

    # Messages of the servers.

    def _receive(self, server: int) -> None:
        for _ in range(MESSAGES_PER_TURN):
            socket = self._links.socket(server)
            if socket is None:
                return
            try:
                frame = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._message(server, socket, wire.decode(frame, max_tokens=self._max_tokens))
            except WireError as error:
                self._drop(server, "malformed", str(error))
            while socket.getsockopt(zmq.RCVMORE):
                socket.recv(copy=False)

    def _drop(self, server: int, reason: str, detail: str) -> None:
        self.dropped(reason, detail, self.fleet.servers[server].address)

    def _message(self, server: int, socket: zmq.Socket[bytes], message: wire.Message) -> None:
        match message:
            case wire.HelloReply() | wire.Incompatible():
                greeting = self._greetings.get(server)
                if greeting is not None:
                    greeting.reply = message
                    self._greeted(greeting)
            case wire.Refusal(ticket, reason, busy):
                fault, why = Fault.BUSY if busy else Fault.SAMPLE, f"refused: {reason}"
                self.fleet.rejected(server, _key(ticket), ticket.attempt, fault, why, time.monotonic())
            case wire.Header(ticket):
                job = self._job(server, ticket)
                if job is None:
                    self._drop(server, "not outstanding", f"{_key(ticket)} attempt {ticket.attempt}")
                    return
                problem = self._deliver(socket, job, message)
                if problem is not None:
                    reason, detail = problem
                    self._drop(server, reason, f"{job} attempt {ticket.attempt}: {detail}")
                    now, why = time.monotonic(), f"{reason}: {detail}"
                    self.fleet.rejected(server, job.key, ticket.attempt, Fault.DOUBT, why, now)
            case _:
                self._drop(server, "malformed", f"a server does not send {type(message).__name__}")

    def _job(self, server: int, ticket: Ticket) -> Job | None:
        if (ticket.run_id, ticket.receiver) != (self._identity.run_id, self._links.receiver(server)):
            return None
        return self.fleet.claim(server, _key(ticket), ticket.attempt)

    def _deliver(self, socket: zmq.Socket[bytes], job: Job, header: wire.Header) -> tuple[str, str] | None:
        """Moves a message's payload into the ring; gives (reason, detail) when it is not what was asked for."""
        want = self.delivery.want(job.key)
        if header.layout != want.layout:
            return "wrong layout", f"{header.layout} came, {want.layout} was asked for"
        if not socket.getsockopt(zmq.RCVMORE):
            return "malformed", "the token ids are missing"
        token_ids = socket.recv()
        if problem := self._questions.problem(job.key[1], token_ids):
            return "wrong tokens", problem
        if len(token_ids) != header.token_bytes:
            return "malformed", f"{header.token_bytes} bytes of token ids were announced, {len(token_ids)} came"
        if not socket.getsockopt(zmq.RCVMORE):
            return "malformed", "the hidden states are missing"
        slot = self.delivery.reserve(job.key)
        if slot is None:  # the rank has left: nobody wants it any more
            self.fleet.delivered(job, header.ticket.attempt, header.tokens, time.monotonic())
            return None
        slot = slot[: header.hidden_bytes]
        received = socket.recv_into(slot)
        if socket.getsockopt(zmq.RCVMORE) or received != len(slot):
            self.delivery.abandon(job.key)
            return "malformed", f"{len(slot)} bytes in one frame were announced, {received} or more frames came"
        try:
            payload.check_payload(header, token_ids, slot)
        except WireError as error:
            self.delivery.abandon(job.key)
            return "corrupt", str(error)
        self.delivery.commit(job.key, token_ids)
        self.fleet.delivered(job, header.ticket.attempt, header.tokens, time.monotonic())
        return None


def _key(ticket: Ticket) -> Key:
    return ticket.epoch, ticket.sample
