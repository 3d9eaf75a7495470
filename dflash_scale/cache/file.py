"""One sample's hidden states as a safetensors file, in the layout that other trainers' data generation uses.

    hs_{sample}.safetensors:   token_ids (T,) int64 · hidden_states (T, K, H), K layers in ascending order of their ids

The few lines of header are read and written here, so that states go from the file into the ring's slot without a copy
in between. `__metadata__` of a file of ours names its layer ids and a checksum, xxh3_64 over the token ids as int32 and
the states: that of the wire. A file without them comes from elsewhere and holds the layers that its folder stands for.

Nothing in a file is believed before it was compared with a bound. T tokens · K layers · H hidden size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from dflash_scale.transport import messages
from dflash_scale.transport.layout import DTYPE_BYTES, MAX_LAYERS, Buffer, Layout, layer_ids_problem

STATES: Final = "hidden_states"
TOKENS: Final = "token_ids"
MAX_HEADER_BYTES: Final = 1 << 20
LENGTH_BYTES: Final = 8  # of the header, before it
TOKEN_BYTES: Final = 8  # int64
BLOCK_BYTES: Final = 1 << 20  # read at once
DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class BadFile(ValueError):
    """A file that is not what is wanted of it; the message says what it is instead."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file says it holds. `layer_ids`, `checksum` None: it does not say. Offsets count from its first byte."""

    tokens: int
    layout: tuple[int, int, str]  # layers, hidden size, dtype as safetensors names it
    layer_ids: tuple[int, ...] | None
    checksum: int | None
    tokens_at: int
    states_at: int
    states_bytes: int


def file_head(layout: Layout, token_ids: bytes, checksum: int) -> bytes:
    """A file's bytes up to its states. token_ids: int32, little-endian."""
    ids = np.frombuffer(token_ids, "<i4").astype("<i8").tobytes()
    tokens = len(ids) // TOKEN_BYTES
    end = len(ids) + tokens * layout.bytes_per_token
    shape = [tokens, len(layout.layer_ids), layout.hidden_size]
    content = {
        "__metadata__": {
            "format": "pt",
            "layer_ids": json.dumps(layout.layer_ids),
            "xxh3": f"{checksum:016x}",
        },
        TOKENS: {"dtype": "I64", "shape": [tokens], "data_offsets": [0, len(ids)]},
        STATES: {"dtype": DTYPES[layout.dtype], "shape": shape, "data_offsets": [len(ids), end]},
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + ids


def write_all(file: int, parts: Sequence[Buffer]) -> None:
    """Writes the parts one after the other; raises OSError."""
    left = [memoryview(part).cast("B") for part in parts]
    while left:
        written = os.writev(file, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def read_token_ids(file: int, most: int) -> bytes:
    """The file's token ids, int32 little-endian. Raises BadFile: it is damaged, or has more than `most`."""
    try:
        stored = _stored(file)
        if stored.tokens > most:
            raise BadFile(f"it has {stored.tokens} tokens, wanted at most {most}")
        return _token_ids(file, stored).astype("<i4").tobytes()
    except OSError as error:
        raise BadFile(f"it cannot be read: {error.strerror}") from error


def _token_ids(file: int, stored: Stored) -> npt.NDArray[np.int64]:
    """(tokens,) int64, as they are stored."""
    ids = bytearray(stored.tokens * TOKEN_BYTES)
    _read(file, memoryview(ids), stored.tokens_at)
    return np.frombuffer(ids, "<i8")


def read_states(file: int, token_ids: bytes, layout: Layout, layer_ids: tuple[int, ...], slot: memoryview) -> None:
    """Reads the states of a sample in the wanted layout.

    Args:
        file: descriptor.
        token_ids: of the sample, int32, little-endian.
        layout: what is wanted of every token; its layers may be some of the stored ones.
        layer_ids: what the file holds if it does not say.
        slot: tokens * layout.bytes_per_token bytes to read into.

    Raises:
        BadFile: it is damaged, of other tokens, or lacks what is wanted. The slot holds anything then.
    """
    try:
        stored = _stored(file)
        layers = _layers(stored, token_ids, layout, layer_ids)
        if not np.array_equal(_token_ids(file, stored), np.frombuffer(token_ids, "<i4")):
            raise BadFile("its token ids are not those of the sample")
        digest = _read_blocks(file, stored, layers, token_ids, slot)
    except OSError as error:
        raise BadFile(f"it cannot be read: {error.strerror}") from error
    if stored.checksum not in (None, digest):
        raise BadFile("its checksum is another")


def _read_blocks(file: int, stored: Stored, layers: list[int] | None, token_ids: bytes, slot: memoryview) -> int:
    """Reads the states block by block, so that each is hashed, and its layers are picked, while it is in the CPU's
    cache. Returns the checksum."""
    token_bytes = stored.states_bytes // stored.tokens
    at_once = max(1, BLOCK_BYTES // token_bytes)  # tokens
    digest = xxhash.xxh3_64(token_ids)
    scratch = slot if layers is None else memoryview(bytearray(at_once * token_bytes))
    for first in range(0, stored.tokens, at_once):
        count = min(at_once, stored.tokens - first)
        start = first * token_bytes if layers is None else 0
        block = scratch[start : start + count * token_bytes]
        _read(file, block, stored.states_at + first * token_bytes)
        digest.update(block)
        if layers is not None:
            rows = np.frombuffer(block, np.uint8).reshape(count, stored.layout[0], -1)
            out = np.frombuffer(slot, np.uint8).reshape(stored.tokens, len(layers), -1)[first : first + count]
            for place, layer in enumerate(layers):
                out[:, place] = rows[:, layer]
    return digest.intdigest()


def _read(file: int, into: memoryview, at: int) -> None:
    while into:
        count = os.preadv(file, [into], at)
        if not count:
            raise BadFile("it ends early")
        into, at = into[count:], at + count


def _layers(stored: Stored, token_ids: bytes, layout: Layout, default: tuple[int, ...]) -> list[int] | None:
    """The places of the wanted layers among the stored ones; None if they are all of them."""
    count, hidden_size, dtype = stored.layout
    if (hidden_size, dtype) != (layout.hidden_size, DTYPES[layout.dtype]):
        raise BadFile(
            f"its states are {hidden_size} wide and {dtype}, wanted {layout.hidden_size} and {DTYPES[layout.dtype]}"
        )
    if stored.tokens * messages.TOKEN_ID_BYTES != len(token_ids):
        raise BadFile(f"it has {stored.tokens} tokens, the sample {len(token_ids) // messages.TOKEN_ID_BYTES}")
    ids = default if stored.layer_ids is None else stored.layer_ids
    if len(ids) != count or count > MAX_LAYERS:
        raise BadFile(f"it has {count} layers, wanted {len(ids)}: {list(ids)}")
    if missing := set(layout.layer_ids) - set(ids):
        raise BadFile(f"it has layers {list(ids)} and lacks {sorted(missing)}")
    return None if ids == layout.layer_ids else [ids.index(layer) for layer in layout.layer_ids]


def _stored(file: int) -> Stored:
    """Reads and checks the header."""
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, LENGTH_BYTES, 0), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise BadFile(f"its header would take {length} bytes of {size}, at most {MAX_HEADER_BYTES} are read")
    try:
        content = json.loads(os.pread(file, length, LENGTH_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadFile("its header is not JSON") from error
    if not isinstance(content, dict) or content.keys() - {"__metadata__"} != {STATES, TOKENS}:
        raise BadFile(f"wanted the tensors {STATES} and {TOKENS}, got {list(content)!r:.200}")
    # The rest of the file must be exactly the two tensors, side by side in either order: no gap, overlap or tail, so
    # that every byte that is read later was accounted for here.
    data = size - LENGTH_BYTES - length
    tokens_dtype, tokens_shape, tokens_span = _tensor(content[TOKENS], 1)
    dtype, shape, span = _tensor(content[STATES], 3)
    number = next((DTYPE_BYTES[ours] for ours, name in DTYPES.items() if name == dtype), 0)
    if tokens_dtype != "I64" or not number:
        raise BadFile(f"{TOKENS} are {tokens_dtype!r:.20} and {STATES} {dtype!r:.20}, wanted I64 and {DTYPES}")
    if not all(shape):
        raise BadFile(f"{STATES} have the shape {shape}, wanted no dimension of 0")
    if tokens_shape[0] != shape[0]:
        raise BadFile(f"{TOKENS} and {STATES} have {tokens_shape[0]} and {shape[0]} tokens")
    sizes = (tokens_shape[0] * TOKEN_BYTES, shape[0] * shape[1] * shape[2] * number)
    spans = sorted([(*tokens_span, sizes[0]), (*span, sizes[1])])
    if [0, spans[0][1], data] != [spans[0][0], spans[1][0], spans[1][1]] or any(b - a != n for a, b, n in spans):
        raise BadFile(f"its tensors do not fill its {data} bytes of data: it was truncated, or written wrongly")
    start = LENGTH_BYTES + length
    metadata = content.get("__metadata__")
    layer_ids, checksum = _metadata(metadata if isinstance(metadata, dict) else {})
    at = (start + tokens_span[0], start + span[0])
    return Stored(shape[0], (shape[1], shape[2], dtype), layer_ids, checksum, *at, sizes[1])


def _tensor(entry: Any, dimensions: int) -> tuple[str, list[int], tuple[int, int]]:
    """dtype, shape and offsets of a tensor in the header."""
    if not isinstance(entry, dict):
        raise BadFile(f"its header describes a tensor as {entry!r:.80}")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    for numbers, count in ((shape, dimensions), (span, 2)):
        if not isinstance(numbers, list) or len(numbers) != count or any(type(n) is not int or n < 0 for n in numbers):
            raise BadFile(f"its header describes a tensor of {dimensions} dimensions as {entry!r:.200}")
    return str(entry.get("dtype")), shape, (span[0], span[1])


def _metadata(given: dict[str, Any]) -> tuple[tuple[int, ...] | None, int | None]:
    """Layer ids and checksum of a file of ours; None each for a file that does not say."""
    try:
        ids = json.loads(given["layer_ids"]) if "layer_ids" in given else None
        checksum = int(given["xxh3"], 16) if "xxh3" in given else None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadFile(f"its metadata cannot be read: {given!r:.200}") from error
    layer_ids = tuple(ids) if isinstance(ids, list) else ids
    if layer_ids is not None and (problem := layer_ids_problem(layer_ids)):
        raise BadFile(f"its layer ids: {problem}")
    return layer_ids, checksum
