"""A TCP proxy on loopback that spoils what a server sends: for tests of what a bad network does to the stream."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Literal

Fault = Literal["none", "corrupt", "cut", "slow", "stall"]

CLEAN_BYTES = 600  # of a connection: a handshake and a greeting, so that the connection is used at all
CUT_AFTER = 5000  # bytes, in the middle of a message
SLOW_BYTES_PER_S = 600
CHUNK = 2048
Pump = Callable[[socket.socket, socket.socket], None]


class Proxy:
    """Forwards to 127.0.0.1:`target`. `fault` may change at any time; `spoiled` counts chunks that were not passed on
    as they came."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.fault: Fault = "none"
        self.spoiled = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while not self._closed.is_set():
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                except ConnectionRefusedError:
                    client.close()
                    continue
                for pump in (self._upwards, self._downwards):
                    threading.Thread(target=self._run, args=(pump, client, server), daemon=True).start()

    def _run(self, pump: Pump, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # either end hung up
            pump(client, server)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _upwards(self, client: socket.socket, server: socket.socket) -> None:
        while data := client.recv(CHUNK):
            server.sendall(data)

    def _downwards(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        while data := bytearray(server.recv(CHUNK)):
            fault = self.fault if passed + len(data) > CLEAN_BYTES else "none"
            self.spoiled += fault != "none"
            if fault == "corrupt":
                data[len(data) // 2] ^= 0x40
            elif fault == "cut" and passed + len(data) > CUT_AFTER:
                client.sendall(data[: len(data) // 2])
                return
            elif fault == "slow":
                time.sleep(len(data) / SLOW_BYTES_PER_S)
            while self.fault == "stall" and not self._closed.is_set() and passed > CLEAN_BYTES:
                time.sleep(0.02)
            client.sendall(data)
            passed += len(data)
