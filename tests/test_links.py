"""A receiver's connections against a real publisher: a connection that was given up brings nothing any more."""

import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from dflash_scale.stream import wire
from dflash_scale.stream.links import Links
from dflash_scale.stream.publisher import Publisher
from dflash_scale.stream.wire import Layout, Ticket

LAYOUT = Layout((1, 2), 8, "float32")
TOKENS = bytes(4 * 3)
STATES = bytes(3 * LAYOUT.bytes_per_token)


@pytest.fixture
def links() -> Iterator[Links]:
    links = Links("run:0:1", 1 << 20)
    yield links
    links.close()


@pytest.fixture
def make_publisher() -> Iterator[Callable[..., Publisher]]:
    made: list[Publisher] = []

    def make(address: str = "tcp://127.0.0.1:0") -> Publisher:
        made.append(Publisher(address, LAYOUT, "model"))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close(linger_s=0)


def receive(links: Links, server: int) -> wire.Message:
    """The next message of a server; frames behind the first are thrown away."""
    deadline = time.monotonic() + 20
    while server not in links.wait(100).readable:
        assert time.monotonic() < deadline, "nothing came"
    socket = links.socket(server)
    assert socket is not None
    return wire.decode(socket.recv_multipart()[0], max_tokens=10)


def greet(links: Links, server: int) -> wire.Message:
    socket = links.socket(server)
    assert socket is not None
    socket.send(wire.encode(wire.Hello("run", links.receiver(server))))
    return receive(links, server)


def ticket(links: Links, server: int, sample: int) -> Ticket:
    return Ticket("run", links.receiver(server), 0, sample, 0, LAYOUT.layer_ids, LAYOUT.dtype)


def test_what_was_asked_over_a_connection_that_was_cut_never_comes(
    links: Links, make_publisher: Callable[..., Publisher]
) -> None:
    publisher = make_publisher()
    links.connect(0, publisher.endpoint)
    assert isinstance(greet(links, 0), wire.HelloReply)
    old = ticket(links, 0, 1)
    links.cut(0)
    assert links.socket(0) is None
    assert links.receiver(0) == ""
    links.connect(0, publisher.endpoint)
    assert isinstance(greet(links, 0), wire.HelloReply)
    assert ticket(links, 0, 1) != old
    assert publisher.send(old, TOKENS, STATES)
    time.sleep(0.3)  # longer than it takes when it arrives
    assert publisher.send(ticket(links, 0, 2), TOKENS, STATES)
    header = receive(links, 0)
    assert isinstance(header, wire.Header)
    assert header.ticket.sample == 2


def test_connections_are_independent_and_many_follow_one_another(
    links: Links, make_publisher: Callable[..., Publisher]
) -> None:
    publishers = [make_publisher() for _ in range(2)]
    for _ in range(20):
        for server, publisher in enumerate(publishers):
            links.connect(server, publisher.endpoint)
    for server in (1, 0):
        assert isinstance(greet(links, server), wire.HelloReply)
    links.cut(0)
    assert isinstance(greet(links, 1), wire.HelloReply)


def test_a_connection_that_breaks_is_said_once_and_given_up(
    links: Links, make_publisher: Callable[..., Publisher]
) -> None:
    publisher = make_publisher()
    links.connect(7, publisher.endpoint)
    greet(links, 7)
    publisher.close(linger_s=0)
    broken: list[int] = []
    deadline = time.monotonic() + 20
    while not broken and time.monotonic() < deadline:
        broken += links.wait(100).broken
    broken += links.wait(300).broken
    assert broken == [7]
    assert links.socket(7) is None
    with pytest.raises(zmq.Again):
        links.connect(7, publisher.endpoint).recv(zmq.NOBLOCK)
