"""The HTTP side of the fleet against a socket that behaves as scripted."""

import contextlib
import itertools
import queue
import socket
import threading
import time

import pytest

from dflash_scale.stream.calls import Calls, Event, HealthAnswered, Posted
from dflash_scale.stream.jobs import Fault, Probe, Send

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Script:
    """A listening socket; each connection is served one list of answers and then closed without a word."""

    def __init__(self, *connections: list[bytes], host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self.listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        threading.Thread(target=self.serve, args=(connections,), daemon=True).start()

    def serve(self, connections: tuple[list[bytes], ...]) -> None:
        for answers in connections:
            connection, _ = self.listener.accept()
            for answer in answers:
                received = b""
                while not received.endswith((b"}", b"\r\n\r\n")) or (b"POST" in received and b"{" not in received):
                    received += connection.recv(65536)
                self.requests.append(received)
                connection.sendall(answer)
            connection.close()
        self.listener.close()


@pytest.fixture
def events() -> queue.SimpleQueue[Event]:
    return queue.SimpleQueue()


def calls_to(address: str, timeout_s: float, events: queue.SimpleQueue[Event]) -> Calls:
    calls = Calls(1, timeout_s, events.put)
    calls.add(address)
    return calls


def post(calls: Calls, events: queue.SimpleQueue[Event], attempt: int) -> Posted:
    calls.post(Send(0, (0, 1), attempt, 0), {"prompt": [1]})
    event = events.get(timeout=20)
    assert isinstance(event, Posted)
    assert event.sent.attempt == attempt
    return event


def test_a_connection_is_kept_and_a_closed_one_is_not_a_dead_server(events: queue.SimpleQueue[Event]) -> None:
    script = Script([OK, OK], [OK])
    calls = calls_to(script.address, 20, events)
    assert [post(calls, events, attempt).fault for attempt in range(3)] == [None] * 3
    assert len(script.requests) == 3
    refused = post(calls, events, 3)
    assert refused.fault is Fault.SERVER
    assert "connection" in refused.reason
    calls.close()


def test_an_engine_is_named_in_a_header(events: queue.SimpleQueue[Event]) -> None:
    for rank, header in ((None, None), (0, b"X-data-parallel-rank: 0"), (3, b"X-data-parallel-rank: 3")):
        script = Script([OK])
        calls = Calls(1, 20, events.put)
        calls.add(script.address, rank)
        assert post(calls, events, 0).fault is None
        lines = script.requests[0].splitlines()
        assert [line for line in lines if line.lower().startswith(b"x-data")] == ([] if header is None else [header])
        calls.close()


def test_a_server_on_ipv6(events: queue.SimpleQueue[Event]) -> None:
    calls = calls_to(Script([OK], host="::1").address, 20, events)
    assert post(calls, events, 0).fault is None
    calls.close()


def test_a_server_that_breaks_off_or_keeps_silent_is_told_apart(events: queue.SimpleQueue[Event]) -> None:
    script = Script([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"], [b""], [b""])
    calls = calls_to(script.address, 0.5, events)
    assert post(calls, events, 0).fault is Fault.DOUBT  # in the middle of an answer
    assert post(calls, events, 1).fault is Fault.SERVER  # closed without an answer
    calls.close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        calls = calls_to(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.3, events)
        assert post(calls, events, 2).reason == "no answer in time"
        calls.close()


def test_health_reports_the_status_or_the_error(events: queue.SimpleQueue[Event]) -> None:
    script = Script([OK], [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"])
    calls = calls_to(script.address, 20, events)
    problems = []
    for serial in range(2):
        calls.health(Probe(0, serial), 20)
        event = events.get(timeout=20)
        assert isinstance(event, HealthAnswered)
        problems.append(event.problem)
    assert problems == ["", "GET /health answered 503"]
    calls.close()


class Dripping:
    """A server that sends a byte of its answer every 50 ms, and never the last one, on every connection."""

    def __init__(self, answer: bytes) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.answer = answer
        self.hung_up: queue.SimpleQueue[int] = queue.SimpleQueue()  # bytes sent on a connection that we closed
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # the test has closed the listener
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.drip, args=(connection,), daemon=True).start()

    def drip(self, connection: socket.socket) -> None:
        sent = 0
        with connection:
            try:
                for byte in itertools.chain(self.answer, itertools.repeat(ord("x"))):
                    connection.sendall(bytes([byte]))
                    sent += 1
                    time.sleep(0.05)
            except OSError:
                self.hung_up.put(sent)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n"])
def test_a_port_that_drips_is_given_up_and_leaks_no_thread(answer: bytes, events: queue.SimpleQueue[Event]) -> None:
    dripping = Dripping(answer)
    before = set(threading.enumerate())
    calls = calls_to(dripping.address, 1.5, events)
    assert post(calls, events, 0).fault is Fault.DOUBT
    if b"Content" not in answer:  # a probe reads the headers alone
        for serial in range(2):
            calls.health(Probe(0, serial), 0.5)
        for _ in range(2):
            event = events.get(timeout=20)
            assert isinstance(event, HealthAnswered)
            assert event.problem == "no answer in time"
    assert dripping.hung_up.get(timeout=20) > 5, "it was read from until the deadline, and then hung up on"
    calls.drop(0)
    ours = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("http-")}
    for thread in ours:
        thread.join(20)
        assert not thread.is_alive()
    dripping.listener.close()
