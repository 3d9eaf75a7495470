"""The handshake with a server, against a real sender and an HTTP side that answers when the test says so."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from dflash_scale.config.stream import ServerAddress
from dflash_scale.fleet.state import Lost, Probe
from dflash_scale.receiver.connections import Connections, Identity, Outcome
from dflash_scale.receiver.http_client import HealthAnswered, Host
from dflash_scale.server.sender import Offer, Sender
from dflash_scale.transport import messages
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.messages import Origin

LAYOUT = Layout((1, 2), 8, "float32")
IDENTITY = Identity("run", "run:0:1", LAYOUT, Origin(), None)


class Http:
    """Answers nothing by itself."""

    def __init__(self) -> None:
        self.probed: list[Probe] = []

    def health(self, host: Host, probe: Probe, timeout_s: float) -> None:
        self.probed.append(probe)


class Bench:
    """One server, and the receiver's connection to it."""

    def __init__(self) -> None:
        self.sender = Sender("tcp://127.0.0.1:0", Offer(LAYOUT, "model"))
        self.entry = ServerAddress(http="http://127.0.0.1:1", zmq=self.sender.endpoint)
        self.http = Http()
        self.connections = Connections(IDENTITY, 1 << 20, self.http)  # type: ignore[arg-type]
        self.connections.join(0, self.entry)
        self.serial = 0

    def begin(self) -> Probe:
        self.serial += 1
        self.connections.probe(Probe(0, self.serial), 2.0)
        return Probe(0, self.serial)

    def reply(self) -> messages.HelloReply:
        """What came of the hello; nobody has been told."""
        deadline = time.monotonic() + 20
        while not self.connections.wait(100).readable:
            assert time.monotonic() < deadline, "nothing came"
        incoming = self.connections[0].receive()
        assert incoming is not None
        message = messages.decode(incoming.header, max_tokens=1)
        assert isinstance(message, messages.HelloReply)
        return message

    def shake(
        self, reply: Callable[[messages.HelloReply], messages.HelloReply] = lambda reply: reply
    ) -> Outcome | None:
        """A whole handshake, with a reply that the test may change."""
        probe = self.begin()
        assert self.connections.health(HealthAnswered(probe, None)) is None
        return self.connections.replied(self.connections[0], reply(self.reply()))

    def await_break(self) -> None:
        deadline = time.monotonic() + 20
        while not (news := self.connections.wait(100)).broken:
            assert time.monotonic() < deadline
        assert [server.index for server in news.broken] == [0]

    def restart(self) -> None:
        """Another process at the same address."""
        endpoint = self.sender.endpoint
        self.sender.close(linger_s=0)
        self.await_break()
        self.sender = Sender(endpoint, Offer(LAYOUT, "other"))

    def close(self) -> None:
        self.connections.close()
        self.sender.close(linger_s=0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_both_ports_have_to_answer_in_either_order(bench: Bench) -> None:
    probe = bench.begin()
    assert bench.http.probed == [probe]
    assert bench.connections.replied(bench.connections[0], bench.reply()) is None
    assert bench.connections.health(HealthAnswered(probe, None)) == Outcome(probe, None)
    assert bench.shake() == Outcome(Probe(0, 2), None)
    server = bench.connections[0]
    assert (server.model, server.handshake) == ("model", None)
    assert bench.connections.replied(server, messages.HelloReply(LAYOUT, "model", "id", Origin())) is None, (
        "nobody asked"
    )


def test_an_answer_to_an_earlier_probe_is_nothing(bench: Bench) -> None:
    old = bench.begin()
    new = bench.begin()
    bench.connections.replied(bench.connections[0], bench.reply())
    assert bench.connections.health(HealthAnswered(old, "too late")) is None
    assert bench.connections.health(HealthAnswered(new, None)) == Outcome(new, None)


def test_a_failed_health_ends_it(bench: Bench) -> None:
    probe = bench.begin()
    assert bench.connections.health(HealthAnswered(probe, "no")) == Outcome(probe, "no")
    assert bench.connections.replied(bench.connections[0], bench.reply()) is None


def test_what_a_server_forgot_is_told_apart(bench: Bench) -> None:
    first = bench.shake()
    assert first is not None and first.lost is Lost.NOTHING
    bench.connections[0].broken = True
    second = bench.shake()
    assert second is not None and second.lost is Lost.CONNECTION
    third = bench.shake()
    assert third is not None and third.lost is Lost.NOTHING
    bench.restart()
    assert (bench.connections[0].receiver, bench.connections[0].broken) == ("", True)
    fourth = bench.shake()
    assert fourth is not None and fourth.lost is Lost.RESTARTED
    assert bench.connections[0].model == "other"


def test_a_break_and_a_cut_end_the_handshake(bench: Bench) -> None:
    bench.shake()
    probe = bench.begin()
    bench.restart()
    assert bench.connections.health(HealthAnswered(probe, None)) is None
    assert bench.connections[0].handshake is None
    bench.shake()
    probe = bench.begin()
    bench.connections.cut(0)
    assert bench.connections[0].receive() is None
    assert bench.connections.health(HealthAnswered(probe, None)) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layout": Layout((1, 3), 8, "float32")}, "sends layers [1, 3] of 8 float32, this run wants layers [1, 2]"),
        ({"data_parallel_rank": 2}, "is the engine with data_parallel_rank 2, the configuration has the only engine"),
    ],
)
def test_a_server_that_does_not_fit_lives(bench: Bench, changed: dict[str, object], said: str) -> None:
    outcome = bench.shake(lambda reply: replace(reply, **changed))  # type: ignore[arg-type]
    assert outcome is not None and outcome.mismatch
    assert outcome.problem is not None and said in outcome.problem
    assert outcome.lost is Lost.NOTHING


def test_a_server_that_comes_back_is_a_new_one(bench: Bench) -> None:
    bench.shake()
    before = bench.connections[0]
    bench.connections.cut(0)
    bench.connections.join(0, bench.entry)
    bench.connections.join(1, bench.entry)
    assert [server.index for server in bench.connections] == [0, 1]
    assert bench.connections[0] is not before
    assert bench.connections[0].server_id == ""
    outcome = bench.shake()
    assert outcome is not None and outcome.problem is None
