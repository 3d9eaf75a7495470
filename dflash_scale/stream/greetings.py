"""The first words between a receiver and a server: who receives, and whether the server has what the run wants."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dflash_scale.config_stream import Server
from dflash_scale.stream import wire
from dflash_scale.stream.jobs import Probe
from dflash_scale.stream.keys import ReceiverKeys
from dflash_scale.stream.wire import Layout, Origin

log = logging.getLogger(__name__)


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
class Greeting:
    """A probe under way: it has succeeded when both ports have answered."""

    probe: Probe
    health: bool = False
    reply: wire.HelloReply | wire.Incompatible | None = None


class Comparison:
    """Compares what servers offer with what the run wants; what cannot be compared is logged once."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._uncompared: set[tuple[str, str]] = set()  # server and what of it, that was said already

    def problem(self, server: Server, reply: wire.HelloReply | wire.Incompatible) -> str:
        """Why `server` cannot serve this run; empty if it can."""
        address = server.name
        if isinstance(reply, wire.Incompatible):
            return f"server {address}: {reply}"
        if reply.data_parallel_rank != server.data_parallel_rank:
            there, here = (
                "the only engine of its server" if rank is None else f"the engine with data_parallel_rank {rank}"
                for rank in (reply.data_parallel_rank, server.data_parallel_rank)
            )
            return (
                f"server {address}: at {server.zmq} is {there}, the configuration has {here}; name each engine of a "
                "server in an entry of its own, with its zmq and its data_parallel_rank"
            )
        got, wanted = reply.layout, self._identity.layout
        if not got.offers(wanted):
            return (
                f"server {address} sends layers {list(got.layer_ids)} of {got.hidden_size} {got.dtype}, this run wants "
                f"layers {list(wanted.layer_ids)} of {wanted.hidden_size} {wanted.dtype}; start the server with the "
                "run's verifier and layer ids, or change verifier.model, .layer_ids and .dtype"
            )
        for what in ("verifier", "tokenizer"):
            theirs, ours = getattr(reply.origin, what), getattr(self._identity.origin, what)
            if theirs and ours and theirs != ours:
                return (
                    f"server {address} serves {reply.model} with the {what} {theirs}, verifier.model has {ours}; start "
                    "the server with the run's verifier, or change verifier.model"
                )
            if not (theirs and ours) and (address, what) not in self._uncompared:
                self._uncompared.add((address, what))
                side = "here" if theirs else "there"
                log.info("the %s of server %s cannot be compared: its files are not %s", what, address, side)
        return ""
