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
  blocks until its pool has room (`connector.py`), others answer what exceeds it by a refusal (`publisher.py`).
- Who may die: either end, at any time. A reconnecting receiver takes its routing id over from its dead
  connection; a restarted server shows a new server id in its hello reply.
- Versions: a hello names the range that the receiver speaks; the server answers in the newest that both speak, or
  with its own range. These two, hello and `incompatible`, look the same in every version; all others carry it.

Nothing here is unpickled, and no size that came over the network is used before it was compared with a bound. The
sockets are in `sockets.py`. Imported inside the vLLM server: standard library and msgpack only.
Shape letters: L verifier layers sent · H hidden size.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgpack

VERSION: Final = 3
VERSIONS: Final = (VERSION, VERSION)  # the oldest and the newest that this program speaks
MAX_HEADER_BYTES: Final = 4096
MAX_REASON_CHARS: Final = 512
MAX_MODEL_CHARS: Final = 1024
MAX_LAYERS: Final = 128
MAX_LAYER_ID: Final = 4096
MAX_KEYS: Final = 16  # of one map
MAX_HIDDEN_SIZE: Final = 1 << 17
MAX_INT: Final = (1 << 63) - 1
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}  # of verifiers
FP8: Final = "float8_e4m3fn"  # with a scale for each token and layer (encoding.py)
FP8_SCALE_BYTES: Final = 4
CONVERSIONS: Final[Mapping[str, tuple[str, ...]]] = {  # what a server may make of its dtype
    "float32": ("float32", "bfloat16", FP8),
    "bfloat16": ("bfloat16", FP8),
    "float16": ("float16", FP8),
    FP8: (FP8,),
}
TOKEN_ID_BYTES: Final = 4

_DIGEST = re.compile(r"(?:[0-9a-f]{16})?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")

Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """A message, ticket or layout that is not what the protocol allows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What every token carries: the hidden states after `layer_ids` decoder layers, (L, H) of `dtype`.

    Id k is the residual stream after k layers (0 = embeddings), before the final norm. A server offers the aux layers
    and the last layer (id = number of layers) in the verifier's dtype; a ticket asks for all of them or for some, in
    that dtype or in a shorter one.
    """

    layer_ids: tuple[int, ...]
    hidden_size: int
    dtype: str

    def __post_init__(self) -> None:
        _check_layer_ids(self.layer_ids)
        _check_int("hidden_size", self.hidden_size, 1, MAX_HIDDEN_SIZE)
        _check_dtype(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        if self.dtype == FP8:
            return len(self.layer_ids) * (self.hidden_size + FP8_SCALE_BYTES)
        return len(self.layer_ids) * self.hidden_size * DTYPE_BYTES[self.dtype]

    def offers(self, other: "Layout") -> bool:
        """Whether `other` can be made of this layout: some of its layers, in its dtype or a shorter one."""
        alike = self.hidden_size == other.hidden_size and other.dtype in CONVERSIONS[self.dtype]
        return alike and set(other.layer_ids) <= set(self.layer_ids)

    def only(self, layer_ids: tuple[int, ...], dtype: str | None = None) -> "Layout":
        """What can be made of this layout; dtype None is its own. Raises WireError for what cannot."""
        part = Layout(layer_ids, self.hidden_size, self.dtype if dtype is None else dtype)
        if not self.offers(part):
            raise WireError(
                f"this server has the layers {list(self.layer_ids)} in {self.dtype}, asked for {list(layer_ids)} in "
                f"{part.dtype}"
            )
        return part

    @classmethod
    def from_params(cls, params: object) -> "Layout":
        fields = _fields("layout", params, ("layer_ids", "hidden_size", "dtype"))
        return cls(_layer_ids(fields["layer_ids"]), fields["hidden_size"], fields["dtype"])


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
        _check_layer_ids(self.layer_ids)
        _check_dtype(self.dtype)
        if type(self.answer) is not bool:
            raise WireError(f"answer must be true or false, got {self.answer!r:.40}")
        for field in ("epoch", "sample", "attempt"):
            _check_int(field, getattr(self, field), 0, MAX_INT)

    def part_of(self, offered: Layout) -> Layout:
        """What it wants of what a server offers. Raises WireError as `Layout.only` does."""
        return offered.only(self.layer_ids, self.dtype)

    def to_params(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_params(cls, params: object) -> "Ticket":
        fields = _fields("ticket", params, tuple(cls.__dataclass_fields__))
        return cls(**{**fields, "layer_ids": _layer_ids(fields["layer_ids"])})

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
            _check_int("data_parallel_rank", self.data_parallel_rank, 0, MAX_INT)
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
        _check_int("tokens", self.tokens, 1, MAX_INT)
        _check_int("token_bytes", self.token_bytes, 0, MAX_INT)
        _check_int("hidden_bytes", self.hidden_bytes, 0, MAX_INT)
        _check_int("checksum", self.checksum, 0, (1 << 64) - 1)
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
_ANY_VERSION: Final = ("hello", "incompatible")
_NAMES: Final = {cls: name for name, cls in _TYPES.items()}
_INNER: Final[Mapping[str, Callable[[object], object]]] = {
    "ticket": Ticket.from_params,
    "layout": Layout.from_params,
    "origin": lambda params: Origin(**_fields("origin", params, ("verifier", "tokenizer"))),
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
    fields = _fields(kind, body, _KEYS[kind])
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


def _fields(what: str, params: object, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(params, dict):
        raise WireError(f"the {what} must be a map with the keys {list(keys)}, got {type(params).__name__}")
    if params.keys() != set(keys):
        raise WireError(f"the {what} must have exactly the keys {list(keys)}, got {list(params)!r:.200}")
    return dict(params)


def _layer_ids(value: object) -> tuple[Any, ...]:
    """A list of layer ids as it comes from JSON or msgpack, not yet checked any further."""
    if not isinstance(value, list | tuple):
        raise WireError(f"layer_ids must be a list, got {type(value).__name__}")
    return tuple(value)


def layer_ids_problem(ids: object, last: int = MAX_LAYER_ID) -> str | None:
    """What is wrong with a tuple of layer ids of which none may be above `last`; None if nothing is."""
    given = ids if isinstance(ids, tuple) else ()
    integers = 1 <= len(given) <= MAX_LAYERS and all(type(k) is int for k in given)
    if integers and given[0] >= 0 and given[-1] <= last and all(a < b for a, b in itertools.pairwise(given)):
        return None
    got = list(ids) if isinstance(ids, tuple) else ids
    return f"got {got!r:.80}, wanted 1 to {MAX_LAYERS} different ids in ascending order from 0 (embeddings) to {last}"


def _check_layer_ids(ids: object) -> None:
    if problem := layer_ids_problem(ids):
        raise WireError(f"layer_ids: {problem}")


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, str) or dtype not in CONVERSIONS:
        raise WireError(f"dtype must be one of {sorted(CONVERSIONS)}, got {dtype!r:.40}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:  # type(), because True is an int to isinstance
        raise WireError(f"{name} must be an integer from {low} to {high}, got {value!r:.40}")


def _check_versions(versions: object) -> None:
    if not isinstance(versions, tuple) or len(versions) != 2:
        raise WireError(f"versions must be two integers, oldest and newest, got {versions!r:.80}")
    _check_int("the oldest version", versions[0], 1, 1 << 31)
    _check_int("the newest version", versions[1], versions[0], 1 << 31)


def check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise WireError(f"{name} must be 1 to 64 characters of A-Z a-z 0-9 . _ : -, got {value!r:.80}")


def _check_text(name: str, value: object, limit: int) -> None:
    if not isinstance(value, str) or len(value) > limit:
        raise WireError(f"{name} must be text of at most {limit} characters, got {value!r:.80}")
