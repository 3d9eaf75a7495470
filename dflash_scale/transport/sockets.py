"""The two ends of the wire as ZeroMQ sockets, with or without keys. What they carry is in `messages.py`.

- Who binds: a server binds a ROUTER (`Router`); receivers connect a DEALER to each server (`Dealers`).
- Ordering: messages of one connection come in the order in which they were sent; of two connections, in any.
- Loss: a message comes whole or not at all. What is on its way when a connection breaks, or is given up, is lost. A
  dealer that broke is never used again: the next one has another routing id, what the server still sends to the old
  one reaches nobody, and so nothing comes that was given up.
- Back-pressure: HIGH_WATER messages wait at each end of a connection, and what the kernel holds. The bounds in bytes
  are the receiver's credit and the server's pool.
- Who may die: either end, at any time. A vanished machine is noticed within 20 s by its heartbeat.

With keys, CURVE encrypts the connection and both ends prove who they are before a message is taken: a server drops
whoever does not hold the secret of a receiver that it knows, a receiver whoever does not hold the server's. Without,
every process that reaches the port is served.

What bounds a stranger's cost: a connection that has not shown its key within HANDSHAKE_MS is closed, and until then no
frame above the header's size is read. What keys cannot bound: ZeroMQ gathers all frames of a message before it hands
them out, so a peer that was let in can fill the memory with one endless message.

Imported inside the vLLM server: standard library, msgpack, xxhash and zmq only.
"""

import errno
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from dflash_scale.transport.addresses import cannot_bind, check_bind
from dflash_scale.transport.keys import ReceiverKeys, ServerKeys
from dflash_scale.transport.layout import Buffer
from dflash_scale.transport.messages import MAX_HEADER_BYTES, check_name

IO_THREADS: Final = 4  # of a receiver; each moves about 2 GB/s, and a connection stays with one of them
HIGH_WATER: Final = 64  # messages per connection inside ZeroMQ; the bound in bytes is the sender's
HANDSHAKE_MS: Final = 5_000
CURVE_BYTES: Final = 64  # what encryption adds to a frame: 33, as MAXMSGSIZE counts them
DOMAIN: Final = b"dflash-scale"  # of the ZeroMQ authentication; any text, but not none
Tracker = zmq.MessageTracker  # of a message that was sent
UNLIKE: Final = "the keys do not belong together, or one side has none"
HANDSHAKE_FAILURES: Final[Mapping[int, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the server does not know the receiver's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: UNLIKE,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: UNLIKE,  # the other side saw it first, and hung up or says nothing
}


class Authenticator:
    """Says for the CURVE sockets of a context which public keys belong to receivers. Start it before binding."""

    def __init__(self, context: "zmq.Context[Any]", receivers: frozenset[bytes]) -> None:
        self._receivers = receivers
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(DOMAIN.decode(), self)
        self._authenticator.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """Called in the authenticator's thread, by this name."""
        return key in self._receivers

    def close(self) -> None:
        self._authenticator.stop()


def bind_router(
    context: "zmq.Context[Any]", address: str, *, insecure: bool = False, keys: ServerKeys | None = None
) -> "zmq.Socket[bytes]":
    """The server's end. Sending to an absent receiver raises EHOSTUNREACH, to a slow one EAGAIN.

    keys: only receivers that hold one of `keys.receivers` are served, and while the context has an `Authenticator`.
    Raises ValueError for an address that needs keys or `insecure`, that is taken or that this machine does not have.
    """
    check_bind("--zmq", address, open_to_others=insecure or keys is not None)
    socket = context.socket(zmq.ROUTER)
    try:
        _set_options(socket, address, max_message_bytes=MAX_HEADER_BYTES)  # hellos are all that a server accepts
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it or an `Authenticator` every key would do
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ValueError(cannot_bind("--zmq", address, error.strerror)) from error
    return socket


class Unsent(Exception):
    """ZeroMQ did not take a message: its receiver is not connected (`away`), or does not read."""

    def __init__(self, error: zmq.ZMQError) -> None:
        super().__init__(str(error))
        self.away = error.errno == errno.EHOSTUNREACH


class Router:
    """A server's end, with whoever connects. All but `wake` belongs to one thread.

    Raises ValueError as `bind_router` does, whose arguments these are.
    """

    def __init__(self, address: str, *, insecure: bool, keys: ServerKeys | None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = Authenticator(self._context, keys.receivers) if keys is not None else None
        try:
            self._socket = bind_router(self._context, address, insecure=insecure, keys=keys)
        except ValueError:
            self._end_context()
            raise
        self._monitor = watch_connection(self._socket, "connections")
        self.endpoint = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake):
            self._poller.register(source, zmq.POLLIN)

    def wake(self) -> None:
        """Ends a `wait`; for other threads."""
        os.eventfd_write(self._wake, 1)

    def wait(self, milliseconds: int) -> None:
        """Until there is something to do, at most this long."""
        if self._wake in dict(self._poller.poll(milliseconds)):
            os.eventfd_read(self._wake)

    def receive(self) -> list[bytes] | None:
        """The next message, if there is one: the routing id of who sent it, and its frames."""
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def turned_away(self) -> str | None:
        """Why one more connection was refused; None if there is none that was not told yet."""
        try:
            while (event := connection_event(self._monitor)) not in HANDSHAKE_FAILURES:
                pass
        except zmq.Again:
            return None
        return HANDSHAKE_FAILURES[event]

    def send(self, receiver: bytes, frames: Sequence[Buffer]) -> Tracker:
        """Sends without a copy: leave the frames alone until the result is `done`, because the kernel has them or the
        connection is gone. Never blocks; raises Unsent."""
        try:
            tracker = self._socket.send_multipart([receiver, *frames], zmq.NOBLOCK, copy=False, track=True)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise Unsent(error) from error
            raise
        assert tracker is not None  # track=True
        return tracker

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close(linger=200)  # milliseconds; frames below 64 KiB are copied and not tracked
        self._end_context()

    def _end_context(self) -> None:
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()


def connect_dealer(
    context: "zmq.Context[Any]",
    address: str,
    receiver: str,
    *,
    max_message_bytes: int,
    keys: ReceiverKeys | None = None,
) -> "zmq.Socket[bytes]":
    """A receiver's end, under the routing id `receiver`. ZeroMQ reconnects by itself.

    max_message_bytes: the largest frame to accept (the hidden states of the longest sample); a server that
    sends more is disconnected before the bytes are read.
    """
    check_name("receiver", receiver)
    socket = context.socket(zmq.DEALER)
    _set_options(socket, address, max_message_bytes=max(MAX_HEADER_BYTES, max_message_bytes))
    socket.setsockopt(zmq.ROUTING_ID, receiver.encode())
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if keys is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    socket.connect(address)
    return socket


class Incoming:
    """One message, read frame by frame. `skip` what is left before the next one is received."""

    def __init__(self, socket: "zmq.Socket[bytes]", header: bytes) -> None:
        self.header = header  # frame 0
        self._socket = socket

    @property
    def more(self) -> bool:
        """Whether there is a frame that was not read."""
        return bool(self._socket.getsockopt(zmq.RCVMORE))

    def read(self) -> bytes:
        """The next frame, of which there is `more`."""
        return self._socket.recv()

    def read_into(self, buffer: memoryview) -> int:
        """The next frame, of which there is `more`, straight to where it is wanted, cut if it is longer; its bytes."""
        return self._socket.recv_into(buffer)

    def skip(self) -> None:
        """Drops the frames that were not read."""
        while self.more:
            self._socket.recv(copy=False)


class Dealer:
    """A receiver's connection to one server, from `Dealers.connect`; `receiver` is the routing id it is reached by."""

    def __init__(self, socket: "zmq.Socket[bytes]", receiver: str) -> None:
        self.receiver = receiver
        self._socket = socket
        self._monitor = watch_connection(socket, receiver)
        self._connected = False

    def send(self, frame: bytes) -> bool:
        """Never blocks. False: so many frames wait already that this one is dropped."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Incoming | None:
        """The next message, if there is one."""
        try:
            return Incoming(self._socket, self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None


@dataclass(slots=True)
class Seen:
    """What a wait found: dealers with messages to read, those that broke, and why one could not be connected."""

    readable: list[Dealer] = field(default_factory=list)
    broken: list[Dealer] = field(default_factory=list)
    refused: dict[Dealer, str] = field(default_factory=dict)


class Dealers:
    """A receiver's connections, waited for together. All but `wake` belongs to one thread.

    Args:
        receiver: what the routing ids begin with; another for every process.
        max_message_bytes: the largest frame to accept.
        keys: of the wire; None where the servers have none.
    """

    def __init__(self, receiver: str, max_message_bytes: int, keys: ReceiverKeys | None = None) -> None:
        self._receiver = receiver
        self._max_message_bytes = max_message_bytes
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=IO_THREADS)
        self._numbers = itertools.count()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sources: dict[Any, Dealer] = {}  # sockets and monitors
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)

    def connect(self, address: str) -> Dealer:
        """A new connection, under a routing id that was never used. One that is not made yet is tried again and again
        by ZeroMQ."""
        receiver = f"{self._receiver}.{next(self._numbers)}"
        socket = connect_dealer(
            self._context, address, receiver, max_message_bytes=self._max_message_bytes, keys=self._keys
        )
        dealer = Dealer(socket, receiver)
        for source in (dealer._socket, dealer._monitor):
            self._sources[source] = dealer
            self._poller.register(source, zmq.POLLIN)
        return dealer

    def cut(self, dealer: Dealer) -> None:
        """Closes a connection, with all that is on its way there."""
        dealer._socket.disable_monitor()
        for source in (dealer._socket, dealer._monitor):
            self._poller.unregister(source)
            del self._sources[source]
            source.close(linger=0)

    def wake(self) -> None:
        """Ends a `wait`; for other threads."""
        os.eventfd_write(self._wake, 1)

    def wait(self, milliseconds: int) -> Seen:
        """Until there is something to do, at most this long. A connection that broke is cut already."""
        seen = Seen()
        for ready, _ in self._poller.poll(milliseconds):
            dealer = self._sources.get(ready)
            if ready == self._wake:
                os.eventfd_read(self._wake)
            elif dealer is None:
                continue  # of a connection that was cut in this very round
            elif ready is dealer._monitor:
                self._connection(dealer, seen)
            else:
                seen.readable.append(dealer)
        seen.readable = [dealer for dealer in seen.readable if dealer not in seen.broken]
        return seen

    def _connection(self, dealer: Dealer, seen: Seen) -> None:
        event = connection_event(dealer._monitor)
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            dealer._connected = True
        elif event in HANDSHAKE_FAILURES:
            seen.refused[dealer] = HANDSHAKE_FAILURES[event]
        elif dealer._connected:  # and not one that was never made: ZeroMQ tries that again by itself
            seen.broken.append(dealer)
            self.cut(dealer)

    def close(self) -> None:
        for dealer in set(self._sources.values()):
            self.cut(dealer)
        self._context.destroy(linger=0)  # the wake-up stays open: a thread that is still in a request may use it


def watch_connection(socket: "zmq.Socket[bytes]", name: str) -> "zmq.Socket[bytes]":
    """A socket to poll and to read with `connection_event`; `name` must be another for every socket of a context."""
    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | sum(HANDSHAKE_FAILURES)
    return socket.get_monitor_socket(events, f"inproc://{name}")


def connection_event(watch: "zmq.Socket[bytes]") -> int:
    """One of HANDSHAKE_FAILURES, EVENT_HANDSHAKE_SUCCEEDED or EVENT_DISCONNECTED; raises zmq.Again if there is none."""
    return int(recv_monitor_message(watch, zmq.NOBLOCK)["event"])


def _set_options(socket: "zmq.Socket[bytes]", address: str, *, max_message_bytes: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + CURVE_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)  # milliseconds: a vanished machine is noticed within 20 s
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 15_000)
    socket.setsockopt(zmq.IPV6, int("[" in address))
