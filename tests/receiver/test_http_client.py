"""The HTTP side of the fleet against a socket that behaves as scripted."""

import contextlib
import itertools
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dflash_scale.fleet.state import Fault, Probe, Send
from dflash_scale.receiver.http_client import HealthAnswered, Host, HttpClient, HttpEvent, Posted, fault_of, judge

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


class Client:
    """An HTTP client of one server, at `address`."""

    def __init__(self, address: str, timeout_s: float, rank: int | None = None) -> None:
        self.events: queue.SimpleQueue[HttpEvent] = queue.SimpleQueue()
        self.http = HttpClient(timeout_s, self.events.put)
        self.host = Host(address, rank)

    def post(self, attempt: int) -> Posted:
        self.http.post(self.host, Send(0, (0, 1), attempt, 0), {"prompt": [1]})
        event = self.events.get(timeout=20)
        assert isinstance(event, Posted)
        assert event.sent.attempt == attempt
        return event

    def health(self, serials: int, timeout_s: float) -> list[str | None]:
        """What came of so many probes at once."""
        for serial in range(serials):
            self.http.health(self.host, Probe(0, serial), timeout_s)
        events = [self.events.get(timeout=20) for _ in range(serials)]
        return [event.problem for event in events if isinstance(event, HealthAnswered)]


@pytest.fixture
def make_client() -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(address: str, timeout_s: float = 20, rank: int | None = None) -> Client:
        made.append(Client(address, timeout_s, rank))
        return made[-1]

    yield make
    for each in made:
        each.http.close()


def test_a_connection_is_kept_and_a_closed_one_is_not_a_dead_server(make_client: Callable[..., Client]) -> None:
    script = Script([OK, OK], [OK])
    client = make_client(script.address)
    assert [client.post(attempt).fault for attempt in range(3)] == [None] * 3
    assert len(script.requests) == 3
    refused = client.post(3)
    assert refused.fault is Fault.SERVER
    assert "connection" in refused.reason


def test_an_engine_is_named_in_a_header(make_client: Callable[..., Client]) -> None:
    for rank, header in ((None, None), (0, b"X-data-parallel-rank: 0"), (3, b"X-data-parallel-rank: 3")):
        script = Script([OK])
        assert make_client(script.address, rank=rank).post(0).fault is None
        lines = script.requests[0].splitlines()
        assert [line for line in lines if line.lower().startswith(b"x-data")] == ([] if header is None else [header])


def test_a_server_on_ipv6(make_client: Callable[..., Client]) -> None:
    assert make_client(Script([OK], host="::1").address).post(0).fault is None


def test_a_server_that_breaks_off_or_keeps_silent_is_told_apart(make_client: Callable[..., Client]) -> None:
    script = Script([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"], [b""], [b""])
    client = make_client(script.address, 0.5)
    assert client.post(0).fault is Fault.DOUBT  # in the middle of an answer
    assert client.post(1).fault is Fault.SERVER  # closed without an answer
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = make_client(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.3)
        assert client.post(2).reason == "no answer in time"


def test_health_reports_the_status_or_the_error(make_client: Callable[..., Client]) -> None:
    script = Script([OK], [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"])
    client = make_client(script.address)
    assert client.health(1, 20) == [None]
    assert client.health(1, 20) == ["GET /health answered 503"]


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
def test_a_port_that_drips_is_given_up_and_leaks_no_thread(answer: bytes, make_client: Callable[..., Client]) -> None:
    dripping = Dripping(answer)
    before = set(threading.enumerate())
    client = make_client(dripping.address, 1.5)
    assert client.post(0).fault is Fault.DOUBT
    if b"Content" not in answer:  # a probe reads the headers alone
        assert client.health(2, 0.5) == ["no answer in time"] * 2
    assert dripping.hung_up.get(timeout=20) > 5, "it was read from until the deadline, and then hung up on"
    assert {thread.name for thread in set(threading.enumerate()) - before} >= {"http"}
    client.http.close()
    assert "http" not in {thread.name for thread in set(threading.enumerate()) - before}
    dripping.listener.close()


def test_many_requests_are_under_way_at_once_in_one_thread(make_client: Callable[..., Client]) -> None:
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        client = make_client(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for attempt in range(40):
            client.http.post(client.host, Send(0, (0, 1), attempt, 0), {"prompt": [1]})
        connections = [silent.accept()[0] for _ in range(40)]
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"http"}
        for connection in connections:
            while not connection.recv(65536).endswith(b"}"):
                pass
            connection.sendall(OK)
        events = [client.events.get(timeout=20) for _ in connections]
        assert sorted(event.sent.attempt for event in events if isinstance(event, Posted)) == list(range(40))
        for connection in connections:
            connection.close()


def test_no_more_of_a_reply_is_read_than_its_bound(
    make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_scale.receiver.http_client.MAX_REPLY_BYTES", 1000)
    endless = b"HTTP/1.1 400 No\r\nContent-Length: 2000000000\r\n\r\n" + b"x" * 5000
    script = Script([endless], [OK])
    client = make_client(script.address)
    assert client.post(0).reason == "HTTP 400: " + "x" * 200
    assert client.post(1).fault is None, "on another connection"


def test_whose_fault_an_answer_is() -> None:
    assert judge(200, b"{}") == (None, "")
    assert judge(400, b'{"error": "too long"}') == (Fault.SAMPLE, 'HTTP 400: {"error": "too long"}')
    assert judge(500, b"")[0] is Fault.DOUBT
    assert judge(429, b"")[0] is Fault.BUSY
    assert fault_of(ConnectionRefusedError()) is fault_of(ConnectionResetError()) is Fault.SERVER
    assert fault_of(TimeoutError()) is Fault.DOUBT
