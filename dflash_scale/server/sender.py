"""The server's sending end: one thread owns the ROUTER, answers hellos and sends what others queue.

The channel's rules are in `messages.py`. `Sender.send` may be called from any thread and never blocks. Two bounds hold
the memory. One is in bytes, over everything that ZeroMQ has not yet released: the caller's pool, if `send` is told
how to give the buffers back, or else `max_bytes`, beyond which a sample is refused. The other is a patience per message
(`AWAY_S` while its receiver is not connected, `STALLED_S` while it does not read), after which the message is dropped,
counted and logged. Imported inside the vLLM server: no torch.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from dflash_scale.transport import messages
from dflash_scale.transport.keys import ServerKeys
from dflash_scale.transport.layout import Buffer, Layout, WireError
from dflash_scale.transport.sockets import Router, Tracker, Unsent

log = logging.getLogger(__name__)

AWAY_S: Final = 5.0  # a receiver that reconnects needs at most RECONNECT_IVL_MAX = 2 s
STALLED_S: Final = 60.0
RETRY_S: Final = 0.01  # with HIGH_WATER this caps a receiver at 6400 messages per second
LOG_EVERY_S: Final = 60.0
MAX_BYTES: Final = 8 << 30  # four receivers at the default stream.server_credit_bytes
NO_ORIGIN: Final = messages.Origin()
HELLOS_PER_TURN: Final = 64  # a flood of hellos must not keep data from leaving
COUNTED: Final = {
    "dropped": "messages dropped",
    "invalid": "messages invalid",
    "refused": "messages refused",
    "turned_away": "connections turned away",
}


@dataclass(slots=True)
class Counters:
    """What became of the messages since the start; read by tests and by the log line."""

    sent: int = 0
    sent_bytes: int = 0
    refused: int = 0
    dropped: int = 0
    invalid: int = 0
    turned_away: int = 0  # connections


@dataclass(frozen=True, slots=True)
class _Sample:
    ticket: messages.Ticket
    token_ids: Buffer
    hidden_states: Buffer
    released: Callable[[], None]


@dataclass(slots=True)
class _Outgoing:
    frames: Sequence[Buffer]
    nbytes: int
    released: Callable[[], None]
    queued_at: float


@dataclass(slots=True)
class _InZmq:
    """Buffers that ZeroMQ still refers to; `done` once the kernel has them or the connection is gone."""

    tracker: Tracker
    released: Callable[[], None]


@dataclass(slots=True)
class _Queues:
    """Owned by the sending thread. One queue per receiver, so that a slow one holds up nobody else."""

    by_receiver: dict[bytes, deque[_Outgoing]] = field(default_factory=dict)
    in_zmq: list[_InZmq] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server has to send, as its hello reply says: see `messages.HelloReply`."""

    layout: Layout
    model: str
    origin: messages.Origin = NO_ORIGIN
    data_parallel_rank: int | None = None


class Sender:
    """Binds `address` and sends hidden states to whoever a ticket names, if that receiver is connected.

    address: tcp://127.0.0.1:PORT (port 0 or * picks one; see `endpoint`) or ipc://PATH.
    offer: what the hello reply says; samples have layers of its layout.
    keys: serve only receivers that hold one of these; without, whoever reaches the address.
    max_bytes: payload bytes held at most, queued or inside ZeroMQ; what belongs to a caller's pool is not counted.
    Raises ValueError for an address that is not allowed, that is taken or that this machine does not have.
    """

    def __init__(
        self,
        address: str,
        offer: Offer,
        *,
        insecure: bool = False,
        keys: ServerKeys | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.layout = offer.layout
        self.server_id = secrets.token_hex(8)
        self.max_bytes = max_bytes
        self.counters = Counters()
        reply = messages.HelloReply(offer.layout, offer.model, self.server_id, offer.origin, offer.data_parallel_rank)
        self._hello_reply = messages.encode(reply)
        self._router = Router(address, insecure=insecure, keys=keys)
        self.endpoint = self._router.endpoint
        self._inbox: deque[_Sample | messages.Refusal] = deque()
        self._lock = threading.Lock()  # over _held_bytes alone
        self._held_bytes = 0
        self._stop_at: float | None = None
        self._logged_at = dict.fromkeys(COUNTED, float("-inf"))
        self._thread = threading.Thread(target=self._run, name="dflash-sender", daemon=True)
        self._thread.start()

    def send(
        self,
        ticket: messages.Ticket,
        token_ids: Buffer,
        hidden_states: Buffer,
        released: Callable[[], None] | None = None,
    ) -> bool:
        """Queues one sample; False if it was refused instead because `max_bytes` are held already.

        token_ids: int32 little-endian bytes. hidden_states: bytes of (tokens, L, H), the layers that the ticket wants.
        The buffers are not copied: leave them alone until `released` is called, on the sending thread, because they
        have been sent or dropped. With it, the memory is the caller's to bound, and nothing is refused.
        Raises WireError if the sizes do not fit each other.
        """
        layout = ticket.part_of(self.layout)
        want = len(token_ids) // messages.TOKEN_ID_BYTES * layout.bytes_per_token
        if len(token_ids) % messages.TOKEN_ID_BYTES or not token_ids or len(hidden_states) != want:
            raise WireError(
                f"{len(token_ids)} bytes of token ids need {want} bytes of states, got {len(hidden_states)}"
            )
        if released is None:
            nbytes = len(token_ids) + len(hidden_states)
            if not self._hold(nbytes):
                self.refuse(ticket, f"the server holds {self._held_bytes} of {self.max_bytes} unsent bytes", busy=True)
                return False
            released = partial(self._free_bytes, nbytes)
        self._inbox.append(_Sample(ticket, token_ids, hidden_states, released))
        self._router.wake()
        return True

    @property
    def alive(self) -> bool:
        """Whether the sending thread runs."""
        return self._thread.is_alive()

    def refuse(self, ticket: messages.Ticket, reason: str, *, busy: bool = False) -> None:
        """Tells the receiver not to wait for this attempt. busy: the sample is not to blame, only the moment."""
        self._inbox.append(messages.Refusal(ticket, reason[: messages.MAX_REASON_CHARS], busy))
        self._router.wake()

    def close(self, linger_s: float = 1.0) -> None:
        """Sends what is queued for at most `linger_s` seconds, then unbinds."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + linger_s
            self._router.wake()
        self._thread.join()

    def _run(self) -> None:
        queues = _Queues()
        try:
            while not self._finished(queues):
                busy = bool(queues.by_receiver or queues.in_zmq)
                self._router.wait(int(1000 * (RETRY_S if busy else 1.0)))
                self._answer_hellos()
                self._count_turned_away()
                self._take_inbox(queues)
                for receiver in list(queues.by_receiver):
                    self._send_queue(queues, receiver)
                self._release_sent(queues)
        except Exception:
            log.exception("The sending thread died: receivers will get nothing more from this server")
            raise
        finally:
            self._router.close()

    def _finished(self, queues: _Queues) -> bool:
        if self._stop_at is None:
            return False
        idle = not (self._inbox or queues.by_receiver or queues.in_zmq)
        return idle or time.monotonic() >= self._stop_at

    def _count_turned_away(self) -> None:
        for _ in range(HELLOS_PER_TURN):
            why = self._router.turned_away()
            if why is None:
                return
            self._count("turned_away", why)

    def _answer_hellos(self) -> None:
        for _ in range(HELLOS_PER_TURN):
            message = self._router.receive()
            if message is None:
                return
            try:
                self._router.send(message[0], [self._answer(message[1:])])
            except WireError as error:
                self._count("invalid", f"from a receiver: {error}")
            except Unsent as error:  # gone again, or it does not read: its next hello is answered
                self._count("dropped", f"hello reply: {error}")

    def _answer(self, frames: list[bytes]) -> bytes:
        """What is said to a receiver's message; raises WireError if it is no hello."""
        if len(frames) != 1:
            raise WireError(f"expected one frame, a hello, got {len(frames)}")
        hello = messages.decode(frames[0], max_tokens=0)
        if not isinstance(hello, messages.Hello):
            raise WireError(f"expected a hello, got {type(hello).__name__}")
        if messages.common_version(hello.versions) is None:
            self._count("invalid", f"hello of {hello.receiver}: it speaks versions {hello.versions}")
            return messages.encode(messages.Incompatible(messages.VERSIONS))
        return self._hello_reply

    def _take_inbox(self, queues: _Queues) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, messages.Refusal):
                self._count("refused", f"{item.ticket}: {item.reason}")
                out = _Outgoing([messages.encode(item)], 0, _nothing, time.monotonic())
            else:
                layout = item.ticket.part_of(self.layout)
                frames = messages.data_frames(item.ticket, layout, item.token_ids, item.hidden_states)
                nbytes = len(item.token_ids) + len(item.hidden_states)
                out = _Outgoing(frames, nbytes, item.released, time.monotonic())
            queues.by_receiver.setdefault(item.ticket.receiver.encode(), deque()).append(out)

    def _send_queue(self, queues: _Queues, receiver: bytes) -> None:
        queue = queues.by_receiver[receiver]
        while queue:
            out = queue[0]
            try:
                tracker = self._router.send(receiver, out.frames)
            except Unsent as error:
                if time.monotonic() - out.queued_at < (AWAY_S if error.away else STALLED_S):
                    return
                out.released()
                self._count("dropped", f"receiver {receiver.decode()}: {error}")
            else:
                self.counters.sent += 1
                self.counters.sent_bytes += out.nbytes
                queues.in_zmq.append(_InZmq(tracker, out.released))
            queue.popleft()
        del queues.by_receiver[receiver]

    def _release_sent(self, queues: _Queues) -> None:
        held = []
        for entry in queues.in_zmq:
            if entry.tracker.done:
                entry.released()
            else:
                held.append(entry)
        queues.in_zmq = held

    def _hold(self, nbytes: int) -> bool:
        with self._lock:
            fits = self._held_bytes + nbytes <= self.max_bytes
            self._held_bytes += nbytes if fits else 0
        return fits

    def _free_bytes(self, nbytes: int) -> None:
        with self._lock:
            self._held_bytes -= nbytes

    def _count(self, what: str, detail: str) -> None:
        """Counts an event and logs it, at most once a minute per kind."""
        total = getattr(self.counters, what) + 1
        setattr(self.counters, what, total)
        now = time.monotonic()
        if now - self._logged_at[what] >= LOG_EVERY_S:
            self._logged_at[what] = now
            log.warning("%d %s so far; the latest: %s", total, COUNTED[what], detail)


def _nothing() -> None:
    """A refusal holds no buffer."""
