"""A receiver's connections against a real sender: what they bring, and what one that was given up no more brings."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dflash_scale.server.sender import Offer, Sender
from dflash_scale.transport import messages
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.messages import Ticket
from dflash_scale.transport.sockets import Dealer, Dealers, Incoming

LAYOUT = Layout((1, 2), 8, "float32")
TOKENS = bytes(4 * 3)
STATES = bytes(range(3 * LAYOUT.bytes_per_token))


@pytest.fixture
def dealers() -> Iterator[Dealers]:
    dealers = Dealers("run:0:1", 1 << 20)
    yield dealers
    dealers.close()


@pytest.fixture
def make_sender() -> Iterator[Callable[..., Sender]]:
    made: list[Sender] = []

    def make(address: str = "tcp://127.0.0.1:0") -> Sender:
        made.append(Sender(address, Offer(LAYOUT, "model")))
        return made[-1]

    yield make
    for sender in made:
        sender.close(linger_s=0)


def receive(dealers: Dealers, dealer: Dealer) -> tuple[messages.Message, Incoming]:
    """The next message of a server."""
    deadline = time.monotonic() + 20
    while dealer not in dealers.wait(100).readable:
        assert time.monotonic() < deadline, "nothing came"
    incoming = dealer.receive()
    assert incoming is not None
    return messages.decode(incoming.header, max_tokens=10), incoming


def greet(dealers: Dealers, dealer: Dealer) -> messages.Message:
    assert dealer.send(messages.encode(messages.Hello("run", dealer.receiver)))
    message, incoming = receive(dealers, dealer)
    assert not incoming.more
    return message


def ticket(dealer: Dealer, sample: int) -> Ticket:
    return Ticket("run", dealer.receiver, 0, sample, 0, LAYOUT.layer_ids, LAYOUT.dtype)


def test_a_payload_is_read_to_where_it_is_wanted(dealers: Dealers, make_sender: Callable[..., Sender]) -> None:
    sender = make_sender()
    dealer = dealers.connect(sender.endpoint)
    greet(dealers, dealer)
    for sample in range(3):
        assert sender.send(ticket(dealer, sample), TOKENS, STATES)
    place = bytearray(len(STATES) + 2)
    _, incoming = receive(dealers, dealer)
    assert incoming.more and incoming.read() == TOKENS
    assert incoming.more and incoming.read_into(memoryview(place)[1:-1]) == len(STATES)
    assert not incoming.more and place == b"\0" + STATES + b"\0"
    _, incoming = receive(dealers, dealer)
    incoming.read()
    assert incoming.read_into(memoryview(bytearray(5))) == len(STATES), "what did not fit is told by the size"
    message, incoming = receive(dealers, dealer)
    assert isinstance(message, messages.Header) and message.ticket.sample == 2
    incoming.skip()
    assert not incoming.more and dealer.receive() is None


def test_what_was_asked_over_a_connection_that_was_cut_never_comes(
    dealers: Dealers, make_sender: Callable[..., Sender]
) -> None:
    sender = make_sender()
    old = dealers.connect(sender.endpoint)
    assert isinstance(greet(dealers, old), messages.HelloReply)
    dealers.cut(old)
    new = dealers.connect(sender.endpoint)
    assert isinstance(greet(dealers, new), messages.HelloReply)
    assert new.receiver != old.receiver
    assert sender.send(ticket(old, 1), TOKENS, STATES)
    time.sleep(0.3)  # longer than it takes when it arrives
    assert sender.send(ticket(new, 2), TOKENS, STATES)
    header, _ = receive(dealers, new)
    assert isinstance(header, messages.Header)
    assert header.ticket.sample == 2


def test_connections_are_independent_and_many_follow_one_another(
    dealers: Dealers, make_sender: Callable[..., Sender]
) -> None:
    senders = [make_sender() for _ in range(2)]
    for _ in range(20):
        for old in [dealers.connect(sender.endpoint) for sender in senders]:
            dealers.cut(old)
    first, second = (dealers.connect(sender.endpoint) for sender in senders)
    for dealer in (second, first):
        assert isinstance(greet(dealers, dealer), messages.HelloReply)
    dealers.cut(first)
    assert isinstance(greet(dealers, second), messages.HelloReply)


def test_a_connection_that_breaks_is_said_once_and_given_up(
    dealers: Dealers, make_sender: Callable[..., Sender]
) -> None:
    sender = make_sender()
    dealer = dealers.connect(sender.endpoint)
    greet(dealers, dealer)
    sender.close(linger_s=0)
    broken: list[Dealer] = []
    deadline = time.monotonic() + 20
    while not broken and time.monotonic() < deadline:
        broken += dealers.wait(100).broken
    broken += dealers.wait(300).broken
    assert broken == [dealer]
    assert dealers.connect(sender.endpoint).receive() is None


def test_another_thread_ends_a_wait(dealers: Dealers) -> None:
    waiting = threading.Thread(target=dealers.wait, args=(600_000,), daemon=True)
    waiting.start()
    dealers.wake()
    waiting.join(20)
    assert not waiting.is_alive()
