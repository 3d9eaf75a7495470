"""What a receiver knows of its servers: one `ServerConnection` each, and the handshake that every probe is.

A handshake has succeeded when both ports of a server have answered, GET /health and the wire's hello, and when what the
server offers is what the run wants. Data connections are made by probes alone, so that a port that hangs up at once is
not called again and again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from dflash_scale.config.stream import ServerAddress
from dflash_scale.fleet.state import Lost, Probe
from dflash_scale.receiver.http_client import HealthAnswered, Host, HttpClient
from dflash_scale.transport import messages
from dflash_scale.transport.keys import ReceiverKeys
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.messages import Origin
from dflash_scale.transport.sockets import Dealer, Dealers, Incoming

log = logging.getLogger(__name__)

Reply = messages.HelloReply | messages.Incompatible


class ServerMismatch(ValueError):
    """A server sends something else than what the run trains on, or speaks another version of the wire."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who receives, and what. Routing ids begin with `receiver`, different for every process; a server must offer all
    layers of `layout`, though not every sample is asked for with all of them, from the verifier `origin`."""

    run_id: str
    receiver: str
    layout: Layout
    origin: Origin
    keys: ReceiverKeys | None


@dataclass(slots=True)
class Handshake:
    """A probe under way, and what has answered so far."""

    probe: Probe
    health: bool = False
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a handshake ended.

    problem: why the server cannot be used; None: it can · lost: what it has forgotten of what it was asked before ·
    mismatch: it lives, and is not a server of this run.
    """

    probe: Probe
    problem: str | None
    lost: Lost = Lost.NOTHING
    mismatch: bool = False


@dataclass(slots=True, eq=False)
class ServerConnection:
    """One server: where it is, the way to it, and who answered there the last time."""

    index: int  # in the fleet
    entry: ServerAddress  # of the configuration, or of the watched file
    host: Host
    dealer: Dealer | None = None  # the data connection; None before the first, and when it broke or was cut
    broken: bool = False  # whether a data connection broke since the last handshake
    handshake: Handshake | None = None
    server_id: str = ""
    model: str = ""

    @property
    def receiver(self) -> str:
        """The routing id under which the server reaches us now; empty without a connection."""
        return "" if self.dealer is None else self.dealer.receiver

    def receive(self) -> Incoming | None:
        """Its next message, if there is one."""
        return None if self.dealer is None else self.dealer.receive()


@dataclass(slots=True)
class News:
    """What a wait found: servers with messages to read, servers whose connection broke, and handshakes that failed."""

    readable: list[ServerConnection] = field(default_factory=list)
    broken: list[ServerConnection] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)


class Connections:
    """The servers of a fleet, by their index there.

    Args:
        identity: who receives, and what.
        max_message_bytes: the largest frame to accept.
        http: the way to the servers' other port.
    """

    def __init__(self, identity: Identity, max_message_bytes: int, http: HttpClient) -> None:
        self._identity = identity
        self._http = http
        self._servers: list[ServerConnection] = []
        self._dealers = Dealers(identity.receiver, max_message_bytes, identity.keys)
        self._owners: dict[Dealer, ServerConnection] = {}
        self._uncompared: set[tuple[str, str]] = set()  # server and what of it, that was said already
        self.wake = self._dealers.wake  # ends a wait; for other threads

    def __getitem__(self, index: int) -> ServerConnection:
        return self._servers[index]

    def __iter__(self) -> Iterator[ServerConnection]:
        return iter(self._servers)

    def join(self, index: int, entry: ServerAddress) -> None:
        """A server that is new, at the next index, or one that was removed and comes back at its old one."""
        server = ServerConnection(index, entry, Host(entry.http, entry.data_parallel_rank))
        self._servers[index : index + 1] = [server]

    def cut(self, index: int) -> None:
        """Gives the data connection up, and a handshake on it."""
        server = self._servers[index]
        server.handshake = None
        if server.dealer is not None:
            self._dealers.cut(server.dealer)
            del self._owners[server.dealer]
            server.dealer = None

    def wait(self, milliseconds: int) -> News:
        """Until there is something to do, at most this long. A connection that broke is given up already."""
        news, seen = News(), self._dealers.wait(milliseconds)
        for dealer in seen.broken:
            server = self._owners.pop(dealer)
            server.dealer, server.handshake = None, None
            server.broken = True
            news.broken.append(server)
        for dealer, why in seen.refused.items():
            server = self._owners[dealer]
            if server.handshake is not None:
                news.failed.append(Outcome(server.handshake.probe, f"no data connection: {why}"))
                server.handshake = None
        news.readable = [self._owners[dealer] for dealer in seen.readable]
        return news

    def close(self) -> None:
        self._dealers.close()

    # The handshake. Each of the two answers may be the last.

    def probe(self, probe: Probe, timeout_s: float) -> None:
        """Begins a handshake, in place of one that has not ended."""
        server = self._servers[probe.server]
        server.handshake = Handshake(probe)
        if server.dealer is None:
            server.dealer = self._dealers.connect(server.entry.zmq)
            self._owners[server.dealer] = server
        self._http.health(server.host, probe, timeout_s)
        if not server.dealer.send(messages.encode(messages.Hello(self._identity.run_id, server.receiver))):
            log.debug("hellos to %s wait already", server.entry.name)

    def health(self, answered: HealthAnswered) -> Outcome | None:
        """The answer to GET /health; gives the outcome if the handshake has ended with it."""
        server = self._servers[answered.probe.server]
        if server.handshake is None or server.handshake.probe != answered.probe:
            return None
        if answered.problem is not None:
            server.handshake = None
            return Outcome(answered.probe, answered.problem)
        server.handshake.health = True
        return self._end(server, server.handshake)

    def replied(self, server: ServerConnection, reply: Reply) -> Outcome | None:
        """The answer to a hello; gives the outcome if the handshake has ended with it."""
        if server.handshake is None:
            return None
        server.handshake.reply = reply
        return self._end(server, server.handshake)

    def _end(self, server: ServerConnection, handshake: Handshake) -> Outcome | None:
        reply = handshake.reply
        if reply is None or not handshake.health:
            return None
        server.handshake = None
        problem = self._mismatch(server.entry, reply)
        if isinstance(reply, messages.Incompatible):
            return Outcome(handshake.probe, problem, mismatch=True)
        lost = Lost.CONNECTION if server.broken else Lost.NOTHING
        if server.server_id not in ("", reply.server_id):
            lost = Lost.RESTARTED
        server.broken = False
        server.server_id = reply.server_id
        server.model = reply.model
        return Outcome(handshake.probe, problem, lost, mismatch=problem is not None)

    def _mismatch(self, entry: ServerAddress, reply: Reply) -> str | None:
        """Why a server cannot serve this run. What cannot be compared is logged once."""
        if isinstance(reply, messages.Incompatible):
            return f"server {entry.name}: {reply}"
        if reply.data_parallel_rank != entry.data_parallel_rank:
            there, here = (
                "the only engine of its server" if rank is None else f"the engine with data_parallel_rank {rank}"
                for rank in (reply.data_parallel_rank, entry.data_parallel_rank)
            )
            return (
                f"server {entry.name}: at {entry.zmq} is {there}, the configuration has {here}; name each engine of a "
                "server in an entry of its own, with its zmq and its data_parallel_rank"
            )
        got, wanted = reply.layout, self._identity.layout
        if not got.offers(wanted):
            return (
                f"server {entry.name} sends layers {list(got.layer_ids)} of {got.hidden_size} {got.dtype}, this run "
                f"wants layers {list(wanted.layer_ids)} of {wanted.hidden_size} {wanted.dtype}; start the server with "
                "the run's verifier and layer ids, or change verifier.model, .layer_ids and .dtype"
            )
        for what in ("verifier", "tokenizer"):
            theirs, ours = getattr(reply.origin, what), getattr(self._identity.origin, what)
            if theirs and ours and theirs != ours:
                return (
                    f"server {entry.name} serves {reply.model} with the {what} {theirs}, verifier.model has {ours}; "
                    "start the server with the run's verifier, or change verifier.model"
                )
            if not (theirs and ours) and (entry.name, what) not in self._uncompared:
                self._uncompared.add((entry.name, what))
                side = "here" if theirs else "there"
                log.info("the %s of server %s cannot be compared: its files are not %s", what, entry.name, side)
        return None
