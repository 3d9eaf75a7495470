"""The payload of a data message, the two frames behind its header: token ids and hidden states, under one checksum.

Token ids are int32 little-endian; hidden states lie as the header's layout says (encoding.py). Imported inside the vLLM
server: standard library and xxhash only.
"""

from collections.abc import Sequence

import xxhash

from dflash_scale.stream.wire import TOKEN_ID_BYTES, Buffer, Header, Layout, Ticket, WireError, decode, encode


def checksum(token_ids: Buffer, hidden_states: Buffer) -> int:
    digest = xxhash.xxh3_64()
    digest.update(token_ids)
    digest.update(hidden_states)
    return digest.intdigest()


def data_frames(ticket: Ticket, layout: Layout, token_ids: Buffer, hidden_states: Buffer) -> list[Buffer]:
    """[header][token ids][hidden states]; the payload, two contiguous buffers of bytes, is not copied."""
    tokens, rest = divmod(len(token_ids), TOKEN_ID_BYTES)
    if rest:
        raise WireError(f"token ids are int32, got {len(token_ids)} bytes")
    digest = checksum(token_ids, hidden_states)
    header = Header(ticket, tokens, layout, len(token_ids), len(hidden_states), digest)
    return [encode(header), token_ids, hidden_states]


def check_payload(header: Header, token_ids: Buffer, hidden_states: Buffer) -> None:
    """Raises WireError unless the two frames are the ones that `header` announced."""
    for name, got, want in (
        ("token ids", len(token_ids), header.token_bytes),
        ("hidden states", len(hidden_states), header.hidden_bytes),
    ):
        if got != want:
            raise WireError(f"the header announces {want} bytes of {name}, the frame has {got}")
    if checksum(token_ids, hidden_states) != header.checksum:
        raise WireError("the payload's checksum differs from the header's")


def decode_data(frames: Sequence[Buffer], *, layout: Layout, max_tokens: int) -> tuple[Header, memoryview, memoryview]:
    """A whole data message -> header, token ids as bytes, hidden states as bytes. Views, not copies."""
    if len(frames) != 3:
        raise WireError(f"a data message has 3 frames, got {len(frames)}")
    header = decode(frames[0], max_tokens=max_tokens)
    if not isinstance(header, Header):
        raise WireError(f"expected a data header, got {type(header).__name__}")
    if header.layout != layout:
        raise WireError(f"the run's layout is {layout}, the server sent {header.layout}")
    check_payload(header, frames[1], frames[2])
    return header, memoryview(frames[1]), memoryview(frames[2])
