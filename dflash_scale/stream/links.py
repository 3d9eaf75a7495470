"""The data connections of a receiver: one ZeroMQ socket per server, watched together with one wake-up for threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import zmq

from dflash_scale.stream import sockets
from dflash_scale.stream.keys import ReceiverKeys

MOST_IO_THREADS: Final = 4  # each moves about 2 GB/s; a connection stays with one of them
# mallopt(3) of glibc
M_TRIM_THRESHOLD: Final = -1
M_MMAP_MAX: Final = -4
M_ARENA_MAX: Final = -8


def keep_freed_memory() -> None:
    """Makes this process use the memory of freed messages again, instead of giving it back.

    ZeroMQ allocates every message anew, and glibc maps what is large, so that the kernel has to clear each page of each
    message: about a third of the time of a transfer. Call it before any thread runs. The process keeps its peak, which
    the credit bounds.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
    libc.mallopt(M_ARENA_MAX, 1)  # other arenas than the first are too small for large messages


@dataclass(slots=True)
class Seen:
    """What a wait found: servers with messages to read, servers whose connection broke, and why one was not made."""

    readable: list[int] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    shut: dict[int, str] = field(default_factory=dict)


class Links:
    """Connects to every address under the routing id `receiver`. All but `wake` belongs to one thread.

    Args:
        addresses: of the servers' publishers.
        receiver: routing id.
        max_message_bytes: the largest frame to accept.
        keys: of the wire; None where the servers have none.
    """

    def __init__(
        self, addresses: Sequence[str], receiver: str, max_message_bytes: int, keys: ReceiverKeys | None = None
    ) -> None:
        self._addresses = list(addresses)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context(io_threads=max(1, min(MOST_IO_THREADS, len(self._addresses))))
        self.sockets = [
            sockets.connect_dealer(self._context, address, receiver, max_message_bytes=max_message_bytes, keys=keys)
            for address in self._addresses
        ]
        self._monitors = [sockets.watch_connection(socket) for socket in self.sockets]
        self._connected: set[int] = set()
        self._poller = zmq.Poller()
        for source in [*self.sockets, *self._monitors, self._wake]:
            self._poller.register(source, zmq.POLLIN)

    def wake(self) -> None:
        """Ends a `wait`; for other threads."""
        os.eventfd_write(self._wake, 1)

    def wait(self, milliseconds: int) -> Seen:
        """Until there is something to do, at most this long. A broken connection is being made anew already."""
        seen = Seen()
        for ready, _ in self._poller.poll(milliseconds):
            if ready == self._wake:
                os.eventfd_read(self._wake)
            elif ready in self._monitors:
                self._connection(self._monitors.index(ready), seen)
            else:
                seen.readable.append(self.sockets.index(ready))
        return seen

    def _connection(self, server: int, seen: Seen) -> None:
        event = sockets.connection_event(self._monitors[server])
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected.add(server)
        elif event in sockets.HANDSHAKE_FAILURES:
            seen.shut[server] = sockets.HANDSHAKE_FAILURES[event]
        elif server in self._connected:  # and not one that was refused, which would be refused again at once
            self._connected.remove(server)
            seen.broken.append(server)
            self.reconnect(server)

    def reconnect(self, server: int) -> None:
        """ZeroMQ reconnects after most failures by itself, but not after a message above MAXMSGSIZE."""
        with contextlib.suppress(zmq.ZMQError):  # it has given the endpoint up already
            self.sockets[server].disconnect(self._addresses[server])
        self.sockets[server].connect(self._addresses[server])

    def close(self) -> None:
        for socket in self.sockets:
            socket.disable_monitor()
        self._context.destroy(linger=0)  # the wake-up stays open: a thread that is still in a request may use it
