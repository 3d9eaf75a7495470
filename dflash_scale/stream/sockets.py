"""The two ends of the wire as ZeroMQ sockets, with or without keys. What they carry is in `wire.py`.

With keys, CURVE encrypts the connection and both ends prove who they are before a message is taken: a server drops
whoever does not hold the secret of a receiver that it knows, a receiver whoever does not hold the server's. Without,
every process that reaches the port is served.

What bounds a stranger's cost: a connection that has not shown its key within HANDSHAKE_MS is closed, and until then no
frame above the header's size is read. What keys cannot bound: ZeroMQ gathers all frames of a message before it hands
them out, so a peer that was let in can fill the memory with one endless message.

Imported inside the vLLM server: standard library, msgpack, xxhash and zmq only.
"""

from collections.abc import Mapping
from typing import Any, Final

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from dflash_scale.addresses import cannot_bind, check_bind
from dflash_scale.stream.keys import ReceiverKeys, ServerKeys
from dflash_scale.stream.wire import MAX_HEADER_BYTES, check_name

HIGH_WATER: Final = 64  # messages per connection inside ZeroMQ; the bound in bytes is the publisher's
HANDSHAKE_MS: Final = 5_000
CURVE_BYTES: Final = 64  # what encryption adds to a frame: 33, as MAXMSGSIZE counts them
DOMAIN: Final = b"dflash-scale"  # of the ZeroMQ authentication; any text, but not none

UNLIKE: Final = "the keys do not belong together, or one side has none"
HANDSHAKE_FAILURES: Final[Mapping[int, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the server does not know the receiver's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: UNLIKE,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: UNLIKE,  # the other side saw it first, and hung up or says nothing
}


class Doorkeeper:
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

    keys: only receivers that hold one of `keys.receivers` are served, and only while a Doorkeeper of the context lives.
    Raises ValueError for an address that needs keys or `insecure`, that is taken or that this machine has not.
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
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it, and without a Doorkeeper, every key would do
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ValueError(cannot_bind("--zmq", address, error.strerror)) from error
    return socket


def connect_dealer(
    context: "zmq.Context[Any]",
    address: str,
    receiver: str,
    *,
    max_message_bytes: int,
    keys: ReceiverKeys | None = None,
) -> "zmq.Socket[bytes]":
    """A receiver's end, under the routing id `receiver`. ZeroMQ reconnects by itself; then say hello again.

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
