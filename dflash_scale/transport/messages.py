"""The wire between a verifier's server and a receiver: messages and their validation.

Channel, in both directions over one ZeroMQ connection per (server, receiver) pair:

- Who binds: the server binds a ROUTER; receivers connect a DEALER under a routing id of their own choosing
  (`Ticket.receiver`). A server never opens a connection, whatever a request asks for.
- Frames: receiver -> server `[hello]`; server -> receiver `[hello reply]`, `[incompatible]`, `[refusal]`, or
  `[header][token ids][hidden states]`. Frame 0 is always one msgpack map of at most 4 KiB with a fixed set of
  keys. Token ids are int32 little-endian, hidden states (tokens, L, H) contiguous in the layout's dtype.
- Ordering: messages to one receiver leave in the order they were queued. Requests finish in any order, so a
  receiver matches data to requests by the whole ticket, never by position.
- Loss: a message may be lost (either end dies, or the receiver stays away too long); the receiver asks again with
  a higher attempt. A message that arrives is whole, and the checksum covers the payload.
- Back-pressure: receivers bound the bytes in flight by credit. The server's bound comes second: a vLLM holds cache
  blocks until its pool has room (`connector.py`), others answer what exceeds it by a refusal (`sender.py`).
- Who may die: either end, at any time. A reconnecting receiver takes its routing id over from its dead
  connection; a restarted server shows a new server id in its hello reply.
- Versions: a hello names the range that the receiver speaks; the server answers in the newest that both speak, or
  with its own range. These two, hello and `incompatible`, look the same in every version; all others carry it.

Nothing here is unpickled, and no size that came over the network is used before it was compared with a bound. The
sockets are in `sockets.py`. Imported inside the vLLM server: standard library and msgpack only.
Shape letters: L verifier layers sent · H hidden size.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgpack
import xxhash

from dflash_scale.transport.layout import (
    MAX_INT,
    MAX_LAYERS,
    Buffer,
    Layout,
    WireError,
    check_dtype,
    check_fields,
    check_int,
    check_layer_ids,
    listed_ids,
)

VERSION: Final = 3
VERSIONS: Final = (VERSION, VERSION)  # the oldest and the newest that this program speaks
MAX_HEADER_BYTES: Final = 4096
MAX_REASON_CHARS: Final = 512
MAX_MODEL_CHARS: Final = 1024
MAX_KEYS: Final = 16  # of one map
TOKEN_ID_BYTES: Final = 4
_DIGEST = re.compile(r"(?:[0-9a-f]{16})?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_ANY_VERSION: Final = ("hello", "incompatible")


@dataclass(frozen=True, slots=True)
class Ticket:
    """Names one attempt at one sample; goes out in kv_transfer_params and comes back in the header."""

    run_id: str
    receiver: str  # the routing id that the data is sent to
    epoch: int
    sample: int
    attempt: int
    layer_ids: tuple[int, ...]  # what is wanted of what the server offers, and in which dtype
    dtype: str
    answer: bool = False  # the prompt's tokens alone, or the answer's too; zeros for the last, which was never fed

    def __post_init__(self) -> None:
        check_name("run_id", self.run_id)
        check_name("receiver", self.receiver)
        check_layer_ids(self.layer_ids)
        check_dtype(self.dtype)
        if type(self.answer) is not bool:
            raise WireError(f"answer must be true or false, got {self.answer!r:.40}")
        for field in ("epoch", "sample", "attempt"):
            check_int(field, getattr(self, field), 0, MAX_INT)

    def part_of(self, offered: Layout) -> Layout:
        """What it wants of what a server offers. Raises WireError as `Layout.only` does."""
        return offered.only(self.layer_ids, self.dtype)

    def to_params(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_params(cls, params: object) -> "Ticket":
        fields = check_fields("ticket", params, tuple(cls.__dataclass_fields__))
        return cls(**{**fields, "layer_ids": listed_ids(fields["layer_ids"])})

    @classmethod
    def from_request(cls, kv_transfer_params: object) -> "Ticket | None":
        """The ticket of a completion request, None if it asks for no hidden states."""
        if kv_transfer_params is None:
            return None
        if not isinstance(kv_transfer_params, dict):
            raise WireError(f"kv_transfer_params must be an object, got {type(kv_transfer_params).__name__}")
        return cls.from_params(kv_transfer_params["dflash"]) if "dflash" in kv_transfer_params else None


@dataclass(frozen=True, slots=True)
class Hello:
    """receiver -> server: asks for the hello reply. versions: the oldest and the newest that the receiver speaks."""

    run_id: str
    receiver: str
    versions: tuple[int, int] = VERSIONS

    def __post_init__(self) -> None:
        _check_versions(self.versions)
        check_name("run_id", self.run_id)
        check_name("receiver", self.receiver)


@dataclass(frozen=True, slots=True)
class Incompatible:
    """server -> receiver, in place of the hello reply: it speaks other versions, from the oldest to the newest."""

    versions: tuple[int, int]

    def __post_init__(self) -> None:
        _check_versions(self.versions)

    def __str__(self) -> str:
        theirs, ours = (f"{low}" if low == high else f"{low} to {high}" for low, high in (self.versions, VERSIONS))
        older = "server" if self.versions[1] < VERSIONS[0] else "receiver"
        return (
            f"the server speaks version {theirs} of the wire, this receiver {ours}; upgrade dflash_scale at the {older}"
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """Digests of the verifier and of its tokenizer, 16 hex digits each; empty where they could not be computed."""

    verifier: str = ""
    tokenizer: str = ""

    def __post_init__(self) -> None:
        for field in ("verifier", "tokenizer"):
            value = getattr(self, field)
            if not isinstance(value, str) or not _DIGEST.fullmatch(value):
                raise WireError(f"{field} must be 16 hex digits or empty, got {value!r:.80}")


@dataclass(frozen=True, slots=True)
class HelloReply:
    """server -> receiver: what the server will send. server_id changes whenever the server restarts.

    data_parallel_rank: which engine of a vLLM server with several it is, None for the only one.
    """

    layout: Layout
    model: str
    server_id: str
    origin: Origin
    data_parallel_rank: int | None = None

    def __post_init__(self) -> None:
        if self.data_parallel_rank is not None:
            check_int("data_parallel_rank", self.data_parallel_rank, 0, MAX_INT)
        _check_text("model", self.model, MAX_MODEL_CHARS)
        check_name("server_id", self.server_id)


@dataclass(frozen=True, slots=True)
class Header:
    """server -> receiver: describes the two payload frames that follow it."""

    ticket: Ticket
    tokens: int
    layout: Layout
    token_bytes: int
    hidden_bytes: int
    checksum: int  # xxh3_64 over the token ids, then the hidden states

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, 1, MAX_INT)
        check_int("token_bytes", self.token_bytes, 0, MAX_INT)
        check_int("hidden_bytes", self.hidden_bytes, 0, MAX_INT)
        check_int("checksum", self.checksum, 0, (1 << 64) - 1)
        if self.token_bytes != self.tokens * TOKEN_ID_BYTES:
            raise WireError(f"{self.tokens} tokens are announced with {self.token_bytes} bytes of token ids")
        if self.hidden_bytes != self.tokens * self.layout.bytes_per_token:
            want = self.tokens * self.layout.bytes_per_token
            raise WireError(f"{self.tokens} tokens need {want} bytes of states, got {self.hidden_bytes}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """server -> receiver: this ticket's hidden states will not come from this attempt.

    busy: the server has no room at the moment, whatever the sample; the attempt should not count against it.
    """

    ticket: Ticket
    reason: str
    busy: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.busy, bool):
            raise WireError(f"busy must be true or false, got {self.busy!r:.40}")
        _check_text("reason", self.reason, MAX_REASON_CHARS)


Message = Hello | Incompatible | HelloReply | Header | Refusal
_TYPES: Final[Mapping[str, type[Message]]] = {
    "hello": Hello,
    "incompatible": Incompatible,
    "hello-reply": HelloReply,
    "data": Header,
    "refusal": Refusal,
}
_NAMES: Final = {cls: name for name, cls in _TYPES.items()}
_INNER: Final[Mapping[str, Callable[[object], object]]] = {
    "ticket": Ticket.from_params,
    "layout": Layout.from_params,
    "origin": lambda params: Origin(**check_fields("origin", params, ("verifier", "tokenizer"))),
}
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {name: tuple(cls.__dataclass_fields__) for name, cls in _TYPES.items()}


def encode(message: Message) -> bytes:
    """Frame 0 of `message`, at most MAX_HEADER_BYTES long."""
    kind = _NAMES[type(message)]
    version = {} if kind in _ANY_VERSION else {"v": VERSION}
    frame = msgpack.packb({**version, "type": kind, **asdict(message)})
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError(f"{type(message).__name__} takes {len(frame)} bytes, the limit is {MAX_HEADER_BYTES}")
    return bytes(frame)


def decode(frame: Buffer, *, max_tokens: int) -> Message:
    """The message in frame 0. Raises WireError, and nothing else, for whatever is not exactly a message.

    max_tokens bounds the token count of a data header, and with it the sizes of the frames behind it.
    """
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError(f"the header takes {len(frame)} bytes, the limit is {MAX_HEADER_BYTES}")
    body = _unpack(frame)
    kind = body.pop("type", None)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise WireError(f"unknown message type {kind!r:.40}, expected one of {sorted(_TYPES)}")
    if kind not in _ANY_VERSION:
        version = body.pop("v", None)
        if type(version) is not int or common_version((version, version)) is None:
            raise WireError(f"the header has protocol version {version!r:.40}, this program speaks {VERSION}")
    fields = check_fields(kind, body, _KEYS[kind])
    if isinstance(versions := fields.get("versions"), list):
        fields["versions"] = tuple(versions)
    for name, read in _INNER.items():
        if name in fields:
            fields[name] = read(fields[name])
    message = _TYPES[kind](**fields)
    if isinstance(message, Header) and message.tokens > max_tokens:
        raise WireError(f"the header announces {message.tokens} tokens, at most {max_tokens} were asked for")
    return message


def _unpack(frame: Buffer) -> dict[Any, Any]:
    """The map in a frame of at most MAX_HEADER_BYTES; the bounds are on what msgpack allocates before it reads."""
    try:
        body = msgpack.unpackb(
            frame,
            max_str_len=MAX_HEADER_BYTES,
            max_array_len=MAX_LAYERS,
            max_map_len=MAX_KEYS,
            max_bin_len=0,  # no field of any message is bytes or an extension type
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"the header is not msgpack: {type(error).__name__}") from error
    if not isinstance(body, dict):
        raise WireError(f"the header must be a map, got {type(body).__name__}")
    return body


def common_version(versions: tuple[int, int]) -> int | None:
    """The newest version that this program and one that speaks `versions`, oldest and newest, have in common."""
    newest = min(versions[1], VERSIONS[1])
    return newest if newest >= max(versions[0], VERSIONS[0]) else None


def _check_versions(versions: object) -> None:
    if not isinstance(versions, tuple) or len(versions) != 2:
        raise WireError(f"versions must be two integers, oldest and newest, got {versions!r:.80}")
    check_int("the oldest version", versions[0], 1, 1 << 31)
    check_int("the newest version", versions[1], versions[0], 1 << 31)


def check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise WireError(f"{name} must be 1 to 64 characters of A-Z a-z 0-9 . _ : -, got {value!r:.80}")


def _check_text(name: str, value: object, limit: int) -> None:
    if not isinstance(value, str) or len(value) > limit:
        raise WireError(f"{name} must be text of at most {limit} characters, got {value!r:.80}")


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
