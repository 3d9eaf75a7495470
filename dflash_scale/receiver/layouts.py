"""Which hidden states a run asks its servers for: layouts by kind of row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dflash_scale.data.schedule import Row
from dflash_scale.transport.layout import FP8, Layout
from dflash_scale.verifier.layers import aux_layers

if TYPE_CHECKING:  # whoever only reads layouts does without pydantic
    from dflash_scale.config.run import Config
    from dflash_scale.verifier.shape import VerifierShape


def run_layouts(config: Config, shape: VerifierShape) -> RowLayouts:
    """The aux layers in every row; the last layer in validation rows, and in training rows where the loss needs the
    verifier's logits. Raises ValueError for layers or a transport that the verifier lacks."""
    layer_ids, dtype = aux_layers(config.verifier.layer_ids, shape.layers), transport_dtype(config, shape)
    whole = Layout((*layer_ids, shape.layers), shape.hidden_size, dtype)
    return RowLayouts(whole if config.loss.needs_verifier else whole.only(layer_ids), whole)


def transport_dtype(config: Config, shape: VerifierShape) -> str:
    """The dtype in which hidden states travel; raises ValueError for a verifier that has no shorter one."""
    dtype, transport = shape.stream_dtype(config.verifier.dtype), config.stream.transport
    if transport == "fp8":
        return FP8
    if transport == "bf16" and dtype == "float16":
        raise ValueError(
            'stream.transport: got "bf16" for hidden states in float16, which are as short; set "exact" or "fp8"'
        )
    return "bfloat16" if transport == "bf16" else dtype


@dataclass(frozen=True, slots=True)
class RowLayouts:
    """`validation` has every layer of `train`, and the last layer (id = number of layers), which tells whether labels
    and verifier agree."""

    train: Layout
    validation: Layout

    @property
    def aux_layer_ids(self) -> tuple[int, ...]:
        """The aux layers, which the drafter sees."""
        return self.validation.layer_ids[:-1]

    def of(self, row: Row) -> Layout:
        return self.train if row.kind == "train" else self.validation

    @classmethod
    def from_params(cls, params: dict[str, object]) -> RowLayouts:
        """From `dataclasses.asdict`, by way of JSON. Raises WireError."""
        return cls(Layout.from_params(params["train"]), Layout.from_params(params["validation"]))
