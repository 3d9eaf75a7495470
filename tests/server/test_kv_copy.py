"""From a cache through a pool that is too small to a receiver that is slow, gone, or never was there.

On a CPU everything runs but the stream and the event; those are a stand-in where a copy has to be under way.
L layers offered · H hidden size · B cache blocks · P tokens in one cache block.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import zmq

from dflash_scale.server import kv_copy, sender
from dflash_scale.server.host_pool import HostPool
from dflash_scale.server.kv_copy import Finished, KvCopier
from dflash_scale.server.sender import Offer, Sender
from dflash_scale.transport import messages, sockets
from dflash_scale.transport.encoding import encode
from dflash_scale.transport.layout import FP8, Layout
from tests.support.data_messages import decode_data

BLOCKS, P, LAYERS, HIDDEN = 64, 4, (1, 3, 6), 2048
LAYOUT = Layout(LAYERS, HIDDEN, "float32")
SAMPLE_BYTES = 10 * LAYOUT.bytes_per_token  # 240 KiB: beyond what ZeroMQ copies by itself


def cache() -> torch.Tensor:
    shape = (BLOCKS, P, len(LAYERS), HIDDEN)
    return torch.arange(BLOCKS * P * len(LAYERS) * HIDDEN, dtype=torch.float32).view(shape)


def finished(
    sample: int,
    *,
    tokens: int = 10,
    receiver: str = "rx",
    layer_ids: tuple[int, ...] = LAYERS,
    dtype: str = "float32",
    answer: bool = False,
) -> Finished:
    ticket = messages.Ticket("run-1", receiver, 0, sample, 0, layer_ids, dtype, answer)
    blocks = tuple((7 * sample + 5 * i) % BLOCKS for i in range(-(-(tokens - answer) // P)))
    return Finished(f"request-{sample}", ticket, tuple(range(sample, sample + tokens)), blocks)


def wanted(request: Finished) -> torch.Tensor:
    """(tokens, layers, H): token t is row t % P of block_ids[t // P]; the last of an answer is zeros."""
    places = [LAYERS.index(layer) for layer in request.ticket.layer_ids]
    rows = [cache()[request.block_ids[t // P], t % P, places] for t in range(request.fed)]
    return torch.stack([*rows, *[torch.zeros_like(rows[0])] * request.ticket.answer])


@dataclass
class Rig:
    copier: KvCopier
    pool: HostPool
    sender: Sender
    cache: torch.Tensor
    context: "zmq.Context[zmq.Socket[bytes]]"

    def connect(self, receiver: str = "rx") -> "zmq.Socket[bytes]":
        socket = sockets.connect_dealer(self.context, self.sender.endpoint, receiver, max_message_bytes=1 << 22)
        socket.send(messages.encode(messages.Hello("run-1", receiver)))
        assert socket.poll(10_000), "no hello reply"
        socket.recv()
        return socket


@pytest.fixture
def make() -> Iterator[Callable[[int], Rig]]:
    made: list[Rig] = []

    def build(pool_bytes: int) -> Rig:
        sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "model"))
        pool, memory = HostPool(pool_bytes, pinned=False), cache()
        made.append(Rig(KvCopier(memory, sender, pool), pool, sender, memory, zmq.Context()))
        return made[-1]

    yield build
    for rig in made:
        rig.copier.close()
        rig.context.destroy(linger=0)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def receive(socket: "zmq.Socket[bytes]", request: Finished) -> None:
    assert socket.poll(30_000), f"{request.request_id} did not arrive"
    layout = request.ticket.part_of(LAYOUT)
    header, ids, raw = decode_data(socket.recv_multipart(), layout=layout, max_tokens=256)
    assert header.ticket == request.ticket
    assert memoryview(ids).cast("i").tolist() == list(request.token_ids)
    got = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(header.tokens, -1)
    assert torch.equal(got, encode(wanted(request), request.ticket.dtype))


@pytest.mark.parametrize("layer_ids", [LAYERS, (1, 3), (1, 6), (6,)])
@pytest.mark.parametrize(("blocks_per_slice", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, FP8), (100, "float32")])
def test_slices_make_up_the_sample(
    make: Callable[[int], Rig],
    monkeypatch: pytest.MonkeyPatch,
    layer_ids: tuple[int, ...],
    blocks_per_slice: int,
    dtype: str,
) -> None:
    """Whatever a slice holds, and 11 tokens are three blocks, the last one not full."""
    span = 1 + LAYERS.index(layer_ids[-1]) - LAYERS.index(layer_ids[0])
    monkeypatch.setattr(kv_copy, "SLICE_BYTES", blocks_per_slice * P * span * HIDDEN * 4)
    rig = make(1 << 20)
    socket = rig.connect()
    request = finished(3, tokens=11, layer_ids=layer_ids, dtype=dtype)
    assert rig.copier.step([request]) == {"request-3"}
    receive(socket, request)


@pytest.mark.parametrize(("tokens", "dtype"), [(9, "float32"), (10, "bfloat16"), (11, FP8)])
def test_the_last_token_of_an_answer_is_zeros(make: Callable[[int], Rig], tokens: int, dtype: str) -> None:
    """Whether it would lie in the last block that was fed or in one that was never written; the pool is not clean."""
    rig = make(1 << 20)
    socket = rig.connect()
    piece = rig.pool.take(rig.pool.nbytes)
    assert piece is not None
    piece.memory.fill_(255)
    rig.pool.give_back(piece)
    request = finished(3, tokens=tokens, dtype=dtype, answer=True)
    assert rig.copier.step([request]) == {"request-3"}
    receive(socket, request)


def test_a_pool_smaller_than_what_is_in_flight_holds_blocks_and_loses_nothing(make: Callable[[int], Rig]) -> None:
    """Twelve samples, room for two: the others' blocks stay until the receiver has read those before them."""
    rig = make(2 * SAMPLE_BYTES + 1000)
    socket = rig.connect()
    requests = [finished(sample) for sample in range(12)]
    copied: set[str] = rig.copier.step(requests)
    assert copied == {"request-0", "request-1"}
    for request in requests:
        until(lambda r=request: step(rig, copied) or r.request_id in copied, f"{request.request_id} was never copied")
        receive(socket, request)
    until(lambda: nothing_lent(rig.pool), "memory was not given back")
    assert copied == {request.request_id for request in requests}
    assert rig.sender.counters.refused == rig.sender.counters.dropped == 0


def nothing_lent(pool: HostPool) -> bool:
    whole = pool.take(pool.nbytes)
    if whole is not None:
        pool.give_back(whole)
    return whole is not None


def step(rig: Rig, copied: set[str]) -> bool:
    copied |= rig.copier.step([])
    return False


def test_the_cache_may_be_reused_once_a_request_is_reported(make: Callable[[int], Rig]) -> None:
    rig = make(1 << 20)
    socket, request = rig.connect(), finished(1)
    assert rig.copier.step([request]) == {"request-1"}
    rig.cache.zero_()
    receive(socket, request)


def test_nothing_small_overtakes_the_oldest(make: Callable[[int], Rig]) -> None:
    """A big sample would wait for ever if small ones took each piece that comes back."""
    rig = make(2 * SAMPLE_BYTES)
    socket = rig.connect()
    first, big, small = finished(0), finished(1, tokens=20), finished(2, tokens=4)
    copied = rig.copier.step([first, big, small])
    assert copied == {"request-0"}, "the pool had room for the small one, but not for the big one before it"
    for request in (first, big, small):
        until(lambda r=request: step(rig, copied) or r.request_id in copied, request.request_id)
        receive(socket, request)


def test_an_absent_receiver_holds_memory_for_a_while_only(
    make: Callable[[int], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "AWAY_S", 0.2)
    rig = make(SAMPLE_BYTES + 1000)
    socket = rig.connect()
    lost, kept = finished(1, receiver="nobody"), finished(2)
    assert rig.copier.step([lost, kept]) == {"request-1"}
    copied: set[str] = set()
    until(lambda: step(rig, copied) or copied == {"request-2"}, "the pool is still held for an absent receiver")
    receive(socket, kept)
    until(lambda: nothing_lent(rig.pool), "memory was not given back")
    assert rig.sender.counters.dropped == 1


def test_a_receiver_that_goes_away_gives_back_what_it_did_not_read(
    make: Callable[[int], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never reads: its samples fill the sockets, ZeroMQ and the pool. Then it is gone."""
    monkeypatch.setattr(sender, "AWAY_S", 0.2)
    rig = make(8 * SAMPLE_BYTES)
    socket = rig.connect()
    requests = [finished(sample) for sample in range(200)]
    copied = rig.copier.step(requests)
    until(lambda: step(rig, copied) or rig.sender.counters.sent > 8, "nothing was sent")
    socket.close(0)
    until(lambda: step(rig, copied) or len(copied) == len(requests), f"only {len(copied)} blocks came back")
    until(lambda: nothing_lent(rig.pool), "memory was not given back")


def test_a_sample_larger_than_the_pool_is_refused_and_its_blocks_are_freed(make: Callable[[int], Rig]) -> None:
    rig = make(SAMPLE_BYTES - 1)
    socket = rig.connect()
    assert rig.copier.step([finished(1)]) == {"request-1"}
    assert socket.poll(10_000)
    refusal = messages.decode(socket.recv(), max_tokens=0)
    assert isinstance(refusal, messages.Refusal)
    assert refusal.reason == f"{SAMPLE_BYTES} bytes of hidden states, the server's pool has {SAMPLE_BYTES - 1}"


def test_refusals_of_the_scheduler_go_out(make: Callable[[int], Rig]) -> None:
    rig = make(1 << 20)
    socket = rig.connect()
    assert rig.copier.step([replace(finished(1), block_ids=(), refusal="because")]) == set()
    assert socket.poll(10_000)
    refusal = messages.decode(socket.recv(), max_tokens=0)
    assert isinstance(refusal, messages.Refusal)
    assert refusal.reason == "because"


class StandInEvent:
    """In place of a CUDA event: a copy that takes its time."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over


def test_blocks_stay_until_the_device_has_copied_them(
    make: Callable[[int], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies end in any order; what is not over is neither sent nor reported."""
    rig = make(1 << 20)
    socket = rig.connect()
    events: list[StandInEvent] = []
    starts: list[Callable[[], None]] = []

    def run(copy: Callable[[], None]) -> StandInEvent:
        starts.append(copy)
        events.append(StandInEvent())
        return events[-1]

    monkeypatch.setattr(rig.copier._side, "run", run)
    first, second = finished(1), finished(2)
    assert rig.copier.step([first, second]) == set()
    assert rig.copier.step([]) == set()
    for i, request in ((1, second), (0, first)):
        starts[i]()
        events[i].over = True
        assert rig.copier.step([]) == {request.request_id}
        receive(socket, request)


def test_a_sender_that_died_ends_the_server(make: Callable[[int], Rig]) -> None:
    """Blocks would be held for ever otherwise, and nobody told."""
    rig = make(1 << 20)
    rig.sender.close()
    with pytest.raises(RuntimeError, match="restart this server"):
        rig.copier.step([])
