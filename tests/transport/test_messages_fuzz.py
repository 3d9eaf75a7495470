"""A million damaged, cut, spliced and invented inputs: nothing but WireError comes out of the wire's readers.

Seeded, so that a failure comes again; it names the input. How much memory a reader takes is looked at on every
thousandth input.
"""

import contextlib
import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from dflash_scale.transport import messages
from dflash_scale.transport.layout import MAX_HIDDEN_SIZE, MAX_INT, MAX_LAYERS, Layout, WireError
from dflash_scale.transport.messages import Header, Hello, HelloReply, Incompatible, Origin, Refusal, Ticket
from tests.support.data_messages import decode_data

INPUTS = 250_000  # of each reader
MAX_TOKENS = 64
MEMORY = 2 << 20  # bytes, of one input of at most 8 KiB
LAYOUT = Layout((2, 4, 6), 8, "bfloat16")
TICKET = Ticket("run-1", "node0.rank:1", 3, 12345, 1, LAYOUT.layer_ids, LAYOUT.dtype)
LARGEST = Layout(tuple(range(MAX_LAYERS)), MAX_HIDDEN_SIZE, "float32")
IDS, STATES = bytes(4 * 5), bytes(5 * LAYOUT.bytes_per_token)
GOOD = [
    messages.encode(message)
    for message in (
        Hello("run-1", "rx"),
        Incompatible((3, 9)),
        HelloReply(LAYOUT, "model", "0123", Origin("0" * 16, "f" * 16)),
        HelloReply(LARGEST, "m" * messages.MAX_MODEL_CHARS, "0123", Origin(), MAX_INT),
        Header(TICKET, 5, LAYOUT, len(IDS), len(STATES), messages.checksum(IDS, STATES)),
        Refusal(TICKET, "x" * messages.MAX_REASON_CHARS, True),
        Refusal(TICKET, "", False),
    )
]
# Beginnings of every kind of msgpack value, with the lengths that promise the most.
BOMBS = [
    *(bytes([kind]) + b"\xff" * size for kind, size in ((0xDD, 4), (0xDF, 4), (0xDB, 4), (0xC6, 4), (0xC9, 5))),
    *(bytes([kind]) + b"\xff\xff" for kind in (0xDC, 0xDE, 0xDA, 0xC5, 0xC8)),
    b"\xdc\x00\x80" * 40,
    b"\x91" * 4000,
    b"\x81\xa1v" * 1300,
    *(bytes([byte]) for byte in (0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xC0, 0xC1, 0xC4, 0xCA, 0xCB, 0xCF, 0xD3, 0xD4, 0xD9)),
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, float("nan"), float("inf"), "", "a",
    "ä" * 99, "\x00", "a/../b", [], [1], [1, 2], [2, 1], [[[]]], {}, {"dflash": {}}, list(range(129)), "x" * 3000,
    [None] * 200,
]  # fmt: skip


def damaged(draw: random.Random) -> bytes:
    """A good frame with something done to its bytes."""
    raw = bytearray(draw.choice(GOOD))
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(raw) + 1)
        match draw.randrange(7):
            case 0:
                raw[at : at + 1] = draw.randbytes(1)
            case 1:
                raw[at : at + draw.randint(0, 9)] = draw.randbytes(draw.randint(0, 9))
            case 2:
                del raw[at:]
            case 3:
                other = draw.choice(GOOD)
                raw[at:] = other[draw.randrange(len(other)) :]
            case 4:
                raw[at : at + draw.randint(0, 4)] = draw.choice(BOMBS)
            case 5:
                raw[at:at] = raw[at : at + draw.randint(1, 200)]
            case _:
                raw[at : at + 1] = bytes([raw[at] ^ (1 << draw.randrange(8))]) if at < len(raw) else b"\x00"
    return bytes(raw)


def altered(draw: random.Random, body: Any) -> Any:
    """A good map with one of its values, at any depth, or one of its keys replaced."""
    if not isinstance(body, dict) or not body or draw.random() < 0.15:
        return draw.choice(VALUES)
    body = dict(body)
    key = draw.choice(list(body))
    match draw.randrange(8):
        case 0:
            del body[key]
        case 1:
            body[draw.choice(["surprise", "v", "ticket", "layout", "type", "versions", 7])] = draw.choice(VALUES)
        case _:
            body[key] = altered(draw, body[key])
    return body


def frame(draw: random.Random) -> bytes:
    kind = draw.randrange(20)
    if kind == 0:
        return draw.randbytes(draw.randrange(300))
    if kind == 1:
        return draw.choice(BOMBS) + draw.randbytes(draw.randrange(60))
    if kind < 8:
        return bytes(msgpack.packb(altered(draw, msgpack.unpackb(draw.choice(GOOD)))))
    return damaged(draw)


def read_frame(draw: random.Random) -> tuple[Any, Callable[[], Any]]:
    raw = frame(draw)
    return raw, lambda: messages.decode(raw, max_tokens=MAX_TOKENS)


def read_data(draw: random.Random) -> tuple[Any, Callable[[], Any]]:
    """A data message with anything in the place of its frames."""
    frames: list[bytes] = [GOOD[4], IDS, STATES]
    for _ in range(draw.randint(1, 2)):
        match draw.randrange(6):
            case 0:
                frames.insert(draw.randrange(4), draw.randbytes(draw.randrange(40)))
            case 1 if frames:
                frames.pop(draw.randrange(len(frames)))
            case 2:
                draw.shuffle(frames)
            case 3 if frames:
                at = draw.randrange(len(frames))
                frames[at] = frames[at][: draw.randrange(len(frames[at]) + 1)]
            case 4 if frames:
                frames[0] = frame(draw)
            case _ if frames:
                at = draw.randrange(len(frames))
                cut = bytearray(frames[at] or b"\x00")
                cut[draw.randrange(len(cut))] ^= 1 << draw.randrange(8)
                frames[at] = bytes(cut)
    return frames, lambda: decode_data(frames, layout=LAYOUT, max_tokens=MAX_TOKENS)


REQUEST = {"dflash": json.loads(json.dumps(TICKET.to_params()))}
LAYOUT_PARAMS = msgpack.unpackb(GOOD[4])["layout"]


def read_ticket(draw: random.Random) -> tuple[Any, Callable[[], Any]]:
    params = altered(draw, REQUEST)
    return params, lambda: Ticket.from_request(params)


def read_layout(draw: random.Random) -> tuple[Any, Callable[[], Any]]:
    params = altered(draw, LAYOUT_PARAMS)
    return params, lambda: Layout.from_params(params)


@pytest.mark.parametrize("make", [read_frame, read_data, read_ticket, read_layout])
def test_only_wire_errors_come_out(make: Callable[[random.Random], tuple[Any, Callable[[], Any]]]) -> None:
    draw = random.Random(20261122)
    refused = 0
    for number in range(INPUTS):
        given, read = make(draw)
        look = number % 1000 == 0
        if look:
            tracemalloc.start()
        try:
            read()
        except WireError:
            refused += 1
        except Exception as error:  # whatever it is, it is a mistake
            raise AssertionError(f"{type(error).__name__} of input {number}: {given!r}") from error
        finally:
            if look:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        if look:
            assert peak < MEMORY, f"{peak} bytes for input {number}: {given!r}"
    assert INPUTS // 2 < refused < INPUTS, "the inputs are all good or all bad, and reach only a part of the reader"


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:4].hex())
def test_promised_lengths_are_not_allocated(bomb: bytes) -> None:
    for raw in (bomb, b"\x81\xa1v" + bomb, (bomb * 4096)[: messages.MAX_HEADER_BYTES]):
        tracemalloc.start()
        with contextlib.suppress(WireError):
            messages.decode(raw[: messages.MAX_HEADER_BYTES], max_tokens=MAX_TOKENS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY, f"{peak} bytes"
