"""What a sample's hidden states are, byte for byte: which layers, of what size, in which form.

Imported inside the vLLM server: standard library only.

L verifier layers sent · H hidden size.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

MAX_LAYERS: Final = 128
MAX_LAYER_ID: Final = 4096
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
        check_layer_ids(self.layer_ids)
        check_int("hidden_size", self.hidden_size, 1, MAX_HIDDEN_SIZE)
        check_dtype(self.dtype)

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
        fields = check_fields("layout", params, ("layer_ids", "hidden_size", "dtype"))
        return cls(listed_ids(fields["layer_ids"]), fields["hidden_size"], fields["dtype"])


def check_fields(what: str, params: object, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(params, dict):
        raise WireError(f"the {what} must be a map with the keys {list(keys)}, got {type(params).__name__}")
    if params.keys() != set(keys):
        raise WireError(f"the {what} must have exactly the keys {list(keys)}, got {list(params)!r:.200}")
    return dict(params)


def listed_ids(value: object) -> tuple[Any, ...]:
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


def check_layer_ids(ids: object) -> None:
    if problem := layer_ids_problem(ids):
        raise WireError(f"layer_ids: {problem}")


def check_dtype(dtype: object) -> None:
    if not isinstance(dtype, str) or dtype not in CONVERSIONS:
        raise WireError(f"dtype must be one of {sorted(CONVERSIONS)}, got {dtype!r:.40}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:  # type(), because True is an int to isinstance
        raise WireError(f"{name} must be an integer from {low} to {high}, got {value!r:.40}")
