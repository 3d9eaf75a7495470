"""A data message as a whole, for tests that receive all of its frames at once; a receiver reads them one by one."""

from collections.abc import Sequence

from dflash_scale.transport.layout import Buffer, Layout, WireError
from dflash_scale.transport.messages import Header, check_payload, decode


def decode_data(frames: Sequence[Buffer], *, layout: Layout, max_tokens: int) -> tuple[Header, memoryview, memoryview]:
    """Header, token ids as bytes, hidden states as bytes. Views, not copies.

    Raises:
        WireError: it is no data message, of another layout, or damaged.
    """
    if len(frames) != 3:
        raise WireError(f"a data message has 3 frames, got {len(frames)}")
    header = decode(frames[0], max_tokens=max_tokens)
    if not isinstance(header, Header):
        raise WireError(f"expected a data header, got {type(header).__name__}")
    if header.layout != layout:
        raise WireError(f"the run's layout is {layout}, the server sent {header.layout}")
    check_payload(header, frames[1], frames[2])
    return header, memoryview(frames[1]), memoryview(frames[2])
