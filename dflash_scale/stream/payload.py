"""The payload of a data message, the two frames behind its header: token ids and hidden states, under one checksum.

Token ids are int32 little-endian; hidden states lie as the header's layout says (encoding.py). Imported inside the vLLM
server: standard library and xxhash only.
"""

import xxhash

from dflash_scale.stream.wire import TOKEN_ID_BYTES, Buffer, Header, Layout, Ticket, WireError, encode


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
