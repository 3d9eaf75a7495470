"""The wire: what is encoded comes back, and nothing but WireError comes out of anything else."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_scale.server.sender import Offer, Sender
from dflash_scale.transport import messages, sockets
from dflash_scale.transport.layout import (
    CONVERSIONS,
    FP8,
    MAX_HIDDEN_SIZE,
    MAX_INT,
    MAX_LAYER_ID,
    MAX_LAYERS,
    Layout,
    WireError,
)
from dflash_scale.transport.messages import Header, Hello, HelloReply, Incompatible, Origin, Refusal, Ticket
from tests.support.data_messages import decode_data

LAYOUT = Layout((2, 4, 6), 8, "bfloat16")
TICKET = Ticket("run-1", "node0.rank:1", 3, 12345, 1, LAYOUT.layer_ids, LAYOUT.dtype)


def random_payload(tokens: int, layout: Layout = LAYOUT) -> tuple[bytes, bytes]:
    return os.urandom(4 * tokens), os.urandom(tokens * layout.bytes_per_token)


names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._:-]{0,63}\Z")
integers = st.integers(0, MAX_INT)
layer_ids = st.sets(st.integers(0, MAX_LAYER_ID), min_size=1, max_size=MAX_LAYERS).map(lambda ids: tuple(sorted(ids)))
dtypes = st.sampled_from(sorted(CONVERSIONS))
tickets = st.builds(Ticket, names, names, integers, integers, integers, layer_ids, dtypes, st.booleans())
layouts = st.builds(
    Layout,
    layer_ids,
    st.integers(1, MAX_HIDDEN_SIZE),
    dtypes,
)
versions = st.tuples(st.integers(1, 99), st.integers(0, 99)).map(lambda pair: (pair[0], sum(pair)))
digests = st.from_regex(r"\A[0-9a-f]{16}\Z") | st.just("")
origins = st.builds(Origin, digests, digests)
any_message = st.one_of(
    st.builds(Hello, names, names, versions),
    st.builds(Incompatible, versions),
    st.builds(HelloReply, layouts, st.text(max_size=200), names, origins, st.none() | integers),
    st.builds(Refusal, tickets, st.text(max_size=messages.MAX_REASON_CHARS), st.booleans()),
    st.builds(
        lambda ticket, tokens, layout, checksum: Header(
            ticket, tokens, layout, tokens * 4, tokens * layout.bytes_per_token, checksum
        ),
        tickets,
        st.integers(1, 1 << 20),
        layouts,
        st.integers(0, (1 << 64) - 1),
    ),
)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=12,
)


@given(any_message)
@settings(deadline=None)
def test_round_trip(message: messages.Message) -> None:
    frame = messages.encode(message)
    assert len(frame) <= messages.MAX_HEADER_BYTES
    assert messages.decode(frame, max_tokens=1 << 20) == message


@given(st.binary(max_size=5000))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_only_wire_errors(raw: bytes) -> None:
    with pytest.raises(WireError):
        messages.decode(raw, max_tokens=1 << 20)


@given(any_message, st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_messages_decode_or_raise_wire_errors(message: messages.Message, data: st.DataObject) -> None:
    raw = bytearray(messages.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for frame in (bytes(raw), bytes(raw[:cut])):
        with contextlib.suppress(WireError):
            messages.decode(frame, max_tokens=1 << 20)


@given(any_message, st.data())
@settings(max_examples=300, deadline=None)
def test_maps_with_wrong_values_raise_wire_errors(message: messages.Message, data: st.DataObject) -> None:
    body = msgpack.unpackb(messages.encode(message))
    inner = data.draw(st.sampled_from([body] + [v for v in body.values() if isinstance(v, dict)]))
    key = data.draw(st.sampled_from(sorted(inner)) | st.just("surprise"))
    inner[key] = data.draw(json_like)
    raw = msgpack.packb(body)
    try:
        decoded = messages.decode(raw, max_tokens=1 << 20)
    except WireError:
        return
    assert messages.decode(messages.encode(decoded), max_tokens=1 << 20) == decoded


@given(json_like)
@settings(deadline=None)
def test_request_parameters_raise_only_wire_errors(params: Any) -> None:
    for candidate in (params, {"dflash": params}):
        with contextlib.suppress(WireError):
            messages.Ticket.from_request(candidate)


def test_deep_nesting_and_timestamps() -> None:
    for raw in (b"\x91" * 4000 + b"\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x0c\xff" + b"\xff" * 12):
        with pytest.raises(WireError):
            messages.decode(raw, max_tokens=1)


def header_map(**changes: Any) -> bytes:
    ids, states = random_payload(5)
    body = msgpack.unpackb(messages.data_frames(TICKET, LAYOUT, ids, states)[0])
    for path, value in changes.items():
        target = body
        *outer, last = path.split("__")
        for key in outer:
            target = target[key]
        target[last] = value
    return bytes(msgpack.packb(body))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"v": messages.VERSION + 1},
            f"protocol version {messages.VERSION + 1}, this program speaks {messages.VERSION}",
        ),
        ({"v": True}, "protocol version True"),
        ({"type": "hullo"}, "unknown message type"),
        ({"type": ["data"]}, "unknown message type"),
        ({"extra": 1}, "exactly the keys"),
        ({"tokens": 6}, "announced with 20 bytes"),
        ({"tokens": 0}, "tokens must be an integer"),
        ({"tokens": -5}, "tokens must be an integer"),
        ({"tokens": 5.0}, "tokens must be an integer"),
        ({"tokens": 1 << 63}, "tokens must be an integer"),
        ({"tokens": 11, "token_bytes": 44, "hidden_bytes": 11 * 48}, "at most 10 were asked for"),
        ({"token_bytes": 24}, "announced with 24 bytes"),
        ({"hidden_bytes": 1}, "need 240 bytes"),
        ({"checksum": -1}, "checksum must be"),
        ({"layout__dtype": "int8"}, "dtype must be one of"),
        ({"layout__dtype": ["float32"]}, "dtype must be one of"),
        ({"layout__layer_ids": []}, "1 to 128 different ids"),
        ({"layout__layer_ids": [2, 2, 6]}, "ascending order"),
        ({"layout__layer_ids": [4, 2, 6]}, "ascending order"),
        ({"layout__layer_ids": "246"}, "must be a list"),
        ({"layout__hidden_size": 1 << 40}, "hidden_size must be"),
        ({"ticket__sample": True}, "sample must be"),
        ({"ticket__receiver": ""}, "receiver must be"),
        ({"ticket__receiver": "\x00abc"}, "receiver must be"),
        ({"ticket__receiver": "a" * 65}, "receiver must be"),
        ({"ticket__run_id": "a/../b"}, "run_id must be"),
        ({"ticket__layer_ids": [6, 2]}, "ascending order"),
        ({"ticket__answer": 1}, "answer must be true or false"),
        ({"ticket__layer_ids": {"2": 6}}, "must be a list"),
        ({"ticket": None}, "ticket must be a map"),
    ],
)
def test_headers_that_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        messages.decode(header_map(**changes), max_tokens=10)


def test_header_size_is_bounded() -> None:
    with pytest.raises(WireError, match="limit is 4096"):
        messages.decode(header_map(extra="x" * 4096), max_tokens=10)


def test_data_message_round_trip() -> None:
    ids, states = random_payload(5)
    frames = messages.data_frames(TICKET, LAYOUT, ids, states)
    assert frames[1] is ids, "the payload must not be copied"
    assert frames[2] is states, "the payload must not be copied"
    header, got_ids, got_states = decode_data(frames, layout=LAYOUT, max_tokens=5)
    assert (header.ticket, header.tokens) == (TICKET, 5)
    assert (bytes(got_ids), bytes(got_states)) == (ids, states)


def test_damaged_data_messages() -> None:
    ids, states = random_payload(5)
    frames = messages.data_frames(TICKET, LAYOUT, ids, states)
    flipped = bytearray(states)
    flipped[17] ^= 1
    for bad, reason in (
        ([frames[0], ids, bytes(flipped)], "checksum"),
        ([frames[0], ids[:-4], states], "frame has 16"),
        ([frames[0], ids, states + b"\0"], "frame has 241"),
        ([frames[0], ids], "3 frames"),
        ([messages.encode(Refusal(TICKET, "no")), ids, states], "expected a data header"),
    ):
        with pytest.raises(WireError, match=reason):
            decode_data(bad, layout=LAYOUT, max_tokens=5)
    with pytest.raises(WireError, match="layout"):
        decode_data(frames, layout=Layout((2, 3, 6), 8, "bfloat16"), max_tokens=5)


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def hello(socket: "zmq.Socket[bytes]", receiver: str) -> HelloReply:
    socket.send(messages.encode(Hello("run-1", receiver)))
    assert socket.poll(10_000), "no hello reply"
    reply = messages.decode(socket.recv(), max_tokens=0)
    assert isinstance(reply, HelloReply)
    return reply


def test_sender_sends_in_order_to_the_receiver_named(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "model-1"))
    address, largest = sender.endpoint, 1 << 20
    ends = {name: sockets.connect_dealer(context, address, name, max_message_bytes=largest) for name in "ab"}
    for name, socket in ends.items():
        assert hello(socket, name) == HelloReply(LAYOUT, "model-1", sender.server_id, Origin())
    sent = [random_payload(1 + sample % 7) for sample in range(200)]
    for sample, (ids, states) in enumerate(sent):
        sender.send(Ticket("run-1", "ab"[sample % 2], 0, sample, 0, LAYOUT.layer_ids, LAYOUT.dtype), ids, states)
    for sample, (ids, states) in enumerate(sent):
        socket = ends["ab"[sample % 2]]
        assert socket.poll(10_000), f"sample {sample} did not arrive"
        header, got_ids, got_states = decode_data(socket.recv_multipart(), layout=LAYOUT, max_tokens=7)
        assert header.ticket.sample == sample
        assert (bytes(got_ids), bytes(got_states)) == (ids, states)
    sender.refuse(Ticket("run-1", "a", 0, 7, 2, LAYOUT.layer_ids, LAYOUT.dtype), "x" * 9999)
    refusal = messages.decode(ends["a"].recv(), max_tokens=0)
    assert refusal == Refusal(
        Ticket("run-1", "a", 0, 7, 2, LAYOUT.layer_ids, LAYOUT.dtype), "x" * messages.MAX_REASON_CHARS
    )
    sender.close()
    assert sender.counters.sent == 201
    assert sender._held_bytes == 0


def test_sender_refuses_what_it_cannot_hold(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    ids, states = random_payload(5)
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"), max_bytes=len(ids) + len(states) - 1)
    socket = sockets.connect_dealer(context, sender.endpoint, "rx", max_message_bytes=1 << 20)
    hello(socket, "rx")
    assert sender.send(Ticket("run-1", "rx", 0, 1, 0, LAYOUT.layer_ids, LAYOUT.dtype), ids, states) is False
    refusal = messages.decode(socket.recv(), max_tokens=0)
    assert isinstance(refusal, Refusal)
    assert "unsent bytes" in refusal.reason
    assert refusal.busy, "the sample is not to blame"
    with pytest.raises(WireError, match="bytes of states"):
        sender.send(TICKET, ids, states[:-1])
    sender.close()


def test_sender_drops_for_an_absent_receiver_and_answers_others(
    context: "zmq.Context[zmq.Socket[bytes]]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflash_scale.server.sender.AWAY_S", 0.3)
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"))
    sender.send(TICKET, *random_payload(5))
    socket = sockets.connect_dealer(context, sender.endpoint, "rx", max_message_bytes=1 << 20)
    hello(socket, "rx")
    socket.send(b"rubbish")
    deadline = time.monotonic() + 10
    while not (sender.counters.dropped and sender.counters.invalid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (sender.counters.dropped, sender.counters.invalid) == (1, 1)
    assert sender._held_bytes == 0
    hello(socket, "rx")
    sender.close()


def test_a_receiver_of_another_version_is_told_both(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"))
    newer, both = (messages.VERSION + 1, messages.VERSION + 2), (1, messages.VERSION + 1)
    socket = sockets.connect_dealer(context, sender.endpoint, "rx", max_message_bytes=1 << 20)
    socket.send(messages.encode(Hello("run-1", "rx", newer)))
    assert socket.poll(10_000), "no answer"
    assert messages.decode(socket.recv(), max_tokens=0) == Incompatible(messages.VERSIONS)
    socket.send(messages.encode(Hello("run-1", "rx", both)))
    assert socket.poll(10_000), "no answer"
    assert isinstance(messages.decode(socket.recv(), max_tokens=0), HelloReply)
    sender.close()


@pytest.mark.parametrize(
    ("theirs", "text"),
    [((1, 1), "the server speaks version 1 of the wire, this receiver 3; upgrade dflash_scale at the server"),
     ((4, 5), "the server speaks version 4 to 5 of the wire, this receiver 3; upgrade dflash_scale at the receiver")],
)  # fmt: skip
def test_incompatible_versions_say_who_is_older(theirs: tuple[int, int], text: str) -> None:
    assert messages.common_version(theirs) is None
    assert str(Incompatible(theirs)) == text


@pytest.mark.parametrize("versions", [[2], [2, 1], [0, 1], [True, 2], ["1", "2"], [1, 2, 3], None, 2, {}])
def test_versions_that_are_none(versions: Any) -> None:
    body = {"type": "hello", "run_id": "r", "receiver": "x", "versions": versions}
    with pytest.raises(WireError, match="version"):
        messages.decode(msgpack.packb(body), max_tokens=0)


def test_sender_waits_for_a_receiver_that_connects_late(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"))
    sender.send(TICKET, *random_payload(5))
    time.sleep(0.2)
    socket = sockets.connect_dealer(context, sender.endpoint, TICKET.receiver, max_message_bytes=1 << 20)
    assert socket.poll(10_000)
    assert decode_data(socket.recv_multipart(), layout=LAYOUT, max_tokens=5)[0].ticket == TICKET
    sender.close()


def test_a_new_receiver_takes_its_name_over(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"))
    first = sockets.connect_dealer(context, sender.endpoint, "rx", max_message_bytes=1 << 20)
    hello(first, "rx")
    second = sockets.connect_dealer(context, sender.endpoint, "rx", max_message_bytes=1 << 20)
    hello(second, "rx")
    sender.send(Ticket("run-1", "rx", 0, 1, 0, LAYOUT.layer_ids, LAYOUT.dtype), *random_payload(5))
    assert second.poll(10_000)
    sender.close()


def test_frames_beyond_the_bound_are_not_read(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    sender = Sender("tcp://127.0.0.1:*", Offer(Layout((1, 2), 1024, "float32"), "m"))
    socket = sockets.connect_dealer(context, sender.endpoint, "rx", max_message_bytes=8192)
    hello(socket, "rx")
    sender.send(Ticket("run-1", "rx", 0, 1, 0, (1, 2), "float32"), *random_payload(5, sender.layout))
    assert not socket.poll(500), "a message of 40 KiB came through a bound of 8 KiB"
    sender.close()


def test_sender_refuses_open_addresses_and_taken_ports() -> None:
    with pytest.raises(ValueError, match="loopback"):
        Sender("tcp://0.0.0.0:*", Offer(LAYOUT, "m"))
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"))
    for address, why in ((sender.endpoint, "Address already in use"), ("tcp://192.0.2.1:*", "Cannot assign")):
        with pytest.raises(ValueError, match=rf"^--zmq: got '{re.escape(address)}', which cannot be bound \({why}"):
            Sender(address, Offer(LAYOUT, "m"), insecure=True)
    sender.close()


def test_imports_nothing_heavy() -> None:
    """The vLLM server's environment has neither DeepSpeed nor our kernels; messages need not even torch."""
    program = "import sys, dflash_scale.server.sender\nprint(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    packages = set(done.stdout.split())
    assert not packages & {"torch", "numpy", "deepspeed", "transformers", "vllm", "datasets", "pydantic"}


def test_a_layout_offers_some_of_its_layers() -> None:
    assert LAYOUT.only((2, 6)) == Layout((2, 6), 8, "bfloat16")
    assert LAYOUT.offers(LAYOUT)
    assert LAYOUT.offers(Layout((2, 4), 8, FP8))
    assert not LAYOUT.offers(Layout((2, 4), 8, "float32"))
    assert not Layout((2, 4), 8, "float16").offers(Layout((2, 4), 8, "bfloat16"))
    assert not LAYOUT.offers(Layout((2, 4), 16, "bfloat16"))
    with pytest.raises(WireError, match=r"layers \[2, 4, 6\] in bfloat16, asked for \[2, 5\]"):
        LAYOUT.only((2, 5))


def test_a_sample_of_layers_that_the_server_has_not() -> None:
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "m"))
    try:
        with pytest.raises(WireError, match="asked for"):
            sender.send(
                Ticket("run-1", "rx", 0, 1, 0, (2, 3), "bfloat16"), *random_payload(5, Layout((2, 3), 8, "bfloat16"))
            )
    finally:
        sender.close()
