"""Which hidden states a run asks its servers for, from its configuration."""

from __future__ import annotations

from dflash_scale.config.run import Config
from dflash_scale.loss import loss_spec
from dflash_scale.stream.layouts import RowLayouts
from dflash_scale.transport.layout import FP8, Layout
from dflash_scale.verifier.layers import aux_layers
from dflash_scale.verifier.shape import VerifierShape


def run_layouts(config: Config, shape: VerifierShape) -> RowLayouts:
    """The aux layers in every row; the last layer in validation rows, and in training rows where the loss needs the
    verifier's logits. Raises ValueError for layers or a transport that the verifier has not."""
    layer_ids, dtype = aux_layers(config.verifier.layer_ids, shape.layers), transport_dtype(config, shape)
    whole = Layout((*layer_ids, shape.layers), shape.hidden_size, dtype)
    return RowLayouts(whole if loss_spec(config).needs_verifier else whole.only(layer_ids), whole)


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
