"""HTTP to the servers: threads that post what the fleet wants sent and put what came of it into one queue.

Each server has threads of its own, started when they are needed and never more than its request slots, so a server that
hangs holds up nobody else. Connections are kept open between requests. Nothing here decides anything.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from dflash_scale.stream.jobs import Fault, Probe, Send

MAX_ANSWER_BYTES: Final = 1 << 22  # of an HTTP answer; it holds one token and, at most, the prompt's ids
SHOWN_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Posted:
    """A request is over. `fault` None: the server answered 200."""

    sent: Send
    fault: Fault | None
    reason: str


@dataclass(frozen=True, slots=True)
class HealthAnswered:
    """GET /health is over; `problem` empty: the server answered 200."""

    probe: Probe
    problem: str


Event = Posted | HealthAnswered


@dataclass(frozen=True, slots=True)
class _Call:
    sent: Send
    body: dict[str, Any]


class Calls:
    """The HTTP side of a fleet.

    Args:
        addresses: http://HOST:PORT of every server.
        slots: threads, and so requests in flight, per server at most.
        timeout_s: seconds without a byte until a request is given up.
        report: called from the threads with every event; must be quick and thread-safe.
    """

    def __init__(self, addresses: Sequence[str], slots: int, timeout_s: float, report: Callable[[Event], None]) -> None:
        self._slots, self._timeout_s, self._report = slots, timeout_s, report
        self._hosts = [(parts.hostname or "", parts.port or 80) for parts in map(urlsplit, addresses)]
        self._queues: list[queue.SimpleQueue[_Call | None]] = [queue.SimpleQueue() for _ in addresses]
        self._threads = [0] * len(addresses)
        self._busy = [0] * len(addresses)  # calls queued or under way
        self._lock = threading.Lock()

    def post(self, sent: Send, body: dict[str, Any]) -> None:
        """POST /v1/completions; one `Posted` follows, whatever happens."""
        with self._lock:
            self._busy[sent.server] += 1
            start = self._busy[sent.server] > self._threads[sent.server] and self._threads[sent.server] < self._slots
            self._threads[sent.server] += start
        if start:
            threading.Thread(target=self._work, args=(sent.server,), name=f"http-{sent.server}", daemon=True).start()
        self._queues[sent.server].put(_Call(sent, body))

    def health(self, probe: Probe, timeout_s: float) -> None:
        """GET /health on a connection of its own; one `HealthAnswered` follows."""
        threading.Thread(target=self._health, args=(probe, timeout_s), name="http-health", daemon=True).start()

    def close(self) -> None:
        """Tells idle threads to end; those in a request are daemons and end with the process."""
        for calls, threads in zip(self._queues, self._threads, strict=True):
            for _ in range(threads):
                calls.put(None)

    def _health(self, probe: Probe, timeout_s: float) -> None:
        connection = http.client.HTTPConnection(*self._hosts[probe.server], timeout=timeout_s)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
            problem = "" if status == 200 else f"GET /health answered {status}"
        except (OSError, http.client.HTTPException) as error:
            problem = explain(error)
        finally:
            connection.close()
        self._report(HealthAnswered(probe, problem))

    def _work(self, server: int) -> None:
        connection = http.client.HTTPConnection(*self._hosts[server], timeout=self._timeout_s)
        while (call := self._queues[server].get()) is not None:
            posted = self._post(connection, call)
            with self._lock:
                self._busy[server] -= 1
            self._report(posted)
        connection.close()

    def _post(self, connection: http.client.HTTPConnection, call: _Call) -> Posted:
        body = json.dumps(call.body).encode()
        reused = connection.sock is not None
        while True:
            try:
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read(MAX_ANSWER_BYTES)
                if response.length and len(text) < MAX_ANSWER_BYTES:
                    raise http.client.IncompleteRead(text, response.length)
                if not response.isclosed():  # more than we read: the connection cannot be used again
                    connection.close()
                return Posted(call.sent, *judge(response.status, text))
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if reused and isinstance(error, ConnectionError):
                    reused = False  # servers close idle connections; a fresh one tells whether this one is down
                    continue
                return Posted(call.sent, fault_of(error), explain(error))


def judge(status: int, text: bytes) -> tuple[Fault | None, str]:
    """Whose fault an HTTP status is."""
    if status == 200:
        return None, ""
    shown = " ".join(text[: 4 * SHOWN_CHARS].decode(errors="replace").split())[:SHOWN_CHARS]
    mine = 400 <= status < 500 and status not in (408, 429)
    return Fault.SAMPLE if mine else Fault.DOUBT, f"HTTP {status}: {shown}"


def fault_of(error: Exception) -> Fault:
    """A server that cannot be reached is down; one that is slow, or breaks off in mid-answer, is in doubt."""
    if isinstance(error, TimeoutError) or not isinstance(error, OSError):
        return Fault.DOUBT
    return Fault.SERVER


def explain(error: Exception) -> str:
    """A short reason, as it stands in a log line."""
    names: dict[type[Exception], str] = {
        ConnectionRefusedError: "connection refused",
        ConnectionResetError: "connection reset",
        http.client.RemoteDisconnected: "connection closed without an answer",
        BrokenPipeError: "connection broken",
        TimeoutError: "no answer in time",
    }
    return names.get(type(error), f"{type(error).__name__}: {error}"[:SHOWN_CHARS])
