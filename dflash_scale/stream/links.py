"""The data connections of a receiver: one ZeroMQ socket per server, watched together with one wake-up for threads.

A connection has a routing id of its own, the receiver's name and a number. A connection that broke, or whose server was
put aside, is never used again: the next one has the next number. What a server still holds for the old id cannot be
sent any more, so nothing arrives that was given up, and a receiver knows how much may be on its way. Connections are
made by probes alone, so that a port that hangs up at once is not called again and again.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any, Final

import zmq

from dflash_scale.stream import sockets
from dflash_scale.stream.keys import ReceiverKeys

IO_THREADS: Final = 4  # each moves about 2 GB/s; a connection stays with one of them


@dataclass(slots=True)
class Seen:
    """What a wait found: servers with messages to read, servers whose connection broke, and why one was not made."""

    readable: list[int] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    shut: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Link:
    receiver: str  # routing id
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]


class Links:
    """At most one connection to each server. All but `wake` belongs to one thread.

    Args:
        receiver: what the routing ids begin with.
        max_message_bytes: the largest frame to accept.
        keys: of the wire; None where the servers have none.
    """

    def __init__(self, receiver: str, max_message_bytes: int, keys: ReceiverKeys | None = None) -> None:
        self._receiver, self._max_message_bytes, self._keys = receiver, max_message_bytes, keys
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context(io_threads=IO_THREADS)
        self._numbers = itertools.count()
        self._links: dict[int, _Link] = {}  # by server
        self._sources: dict[Any, int] = {}  # sockets and monitors -> server
        self._connected: set[int] = set()
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)

    def connect(self, server: int, address: str) -> zmq.Socket[bytes]:
        """A new connection to a server, in place of the one before and of all that is on its way there."""
        self.cut(server)
        receiver = f"{self._receiver}.{next(self._numbers)}"
        socket = sockets.connect_dealer(
            self._context, address, receiver, max_message_bytes=self._max_message_bytes, keys=self._keys
        )
        monitor = sockets.watch_connection(socket, receiver)
        self._links[server] = _Link(receiver, socket, monitor)
        for source in (socket, monitor):
            self._sources[source] = server
            self._poller.register(source, zmq.POLLIN)
        return socket

    def cut(self, server: int) -> None:
        """Closes the connection to a server, if there is one."""
        link = self._links.pop(server, None)
        if link is None:
            return
        self._connected.discard(server)
        link.socket.disable_monitor()
        for source in (link.socket, link.monitor):
            self._poller.unregister(source)
            del self._sources[source]
            source.close(linger=0)

    def socket(self, server: int) -> zmq.Socket[bytes] | None:
        """The connection to a server; None before the first, and when it broke or was cut."""
        link = self._links.get(server)
        return None if link is None else link.socket

    def receiver(self, server: int) -> str:
        """The routing id under which the server reaches us now; empty without a connection."""
        link = self._links.get(server)
        return "" if link is None else link.receiver

    def wake(self) -> None:
        """Ends a `wait`; for other threads."""
        os.eventfd_write(self._wake, 1)

    def wait(self, milliseconds: int) -> Seen:
        """Until there is something to do, at most this long. A connection that broke is cut already."""
        seen = Seen()
        for ready, _ in self._poller.poll(milliseconds):
            server = self._sources.get(ready)
            if ready == self._wake:
                os.eventfd_read(self._wake)
            elif server is None:
                continue  # of a connection that was cut in this very round
            elif ready is self._links[server].monitor:
                self._connection(server, ready, seen)
            else:
                seen.readable.append(server)
        return seen

    def _connection(self, server: int, monitor: zmq.Socket[bytes], seen: Seen) -> None:
        event = sockets.connection_event(monitor)
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected.add(server)
        elif event in sockets.HANDSHAKE_FAILURES:
            seen.shut[server] = sockets.HANDSHAKE_FAILURES[event]
        elif server in self._connected:  # and not one that was never made: ZeroMQ tries that again by itself
            seen.broken.append(server)
            self.cut(server)

    def close(self) -> None:
        for server in list(self._links):
            self.cut(server)
        self._context.destroy(linger=0)  # the wake-up stays open: a thread that is still in a request may use it
