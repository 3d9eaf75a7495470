"""What one GPU holds in a run, from the shapes alone.

An estimate by the formulas that stand in the lines of `activation_bytes` and `loss_bytes`; it leaves out what CUDA,
NCCL and the allocator take.

T tokens in a packed row · A anchors in it · S block size · L aux layers · H hidden size · Hq/Hkv heads ·
D head dim · I width of the MLP · V drafter vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

from dflash_scale.config.run import Config
from dflash_scale.drafter.model import DrafterSpec
from dflash_scale.ops.softmax_loss import SLICE_NUMBERS
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.training.device_rows import READY_AND_IN_USE
from dflash_scale.training.loss import CHUNK_BYTES, fitting_rows, loss_spec
from dflash_scale.transport.layout import FP8

TORCH_SLICES = (5, 12)  # fp32 matrices of a slice that plain torch holds at once, without and with soft terms


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU."""

    parameters: int
    gradients: int
    optimizer: int
    frozen: int
    activations: int
    attention: int
    loss: int
    rows: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What memory depends on, beyond the configuration: ranks, parameters, V and A."""

    world_size: int
    trainable: int
    frozen: int
    vocabulary: int
    anchors: int


def gpu_memory(config: Config, spec: DrafterSpec, layouts: RowLayouts, sizes: Sizes) -> Memory:
    """What one GPU holds. ZeRO divides the optimizer from stage 1, gradients from 2, parameters from 3."""
    stage, world, number = config.zero_stage, sizes.world_size, 2 if config.train.precision == "bf16" else 4
    master = 4 if number == 2 else 0  # with fp32 the parameters are their own master copy
    slots = sizes.anchors * spec.block_size
    return Memory(
        parameters=number * sizes.trainable // (world if stage >= 3 else 1),
        gradients=4 * sizes.trainable // (world if stage >= 2 else 1),
        optimizer=(master + 8) * sizes.trainable // (world if stage >= 1 else 1),
        frozen=number * sizes.frozen,
        activations=activation_bytes(
            spec, slots, config.data.row_tokens, number, recompute=config.train.activation_checkpointing
        ),
        attention=attention_bytes(config, spec, slots),
        loss=loss_bytes(config, spec, slots, sizes.vocabulary),
        rows=rows_bytes(config, layouts),
    )


def row_buffers(config: Config) -> int:
    """Rows that a rank has memory for on its device; of random states no more than the one in training."""
    return 1 if config.stream.mode == "fake" else config.stream.lookahead_rows + READY_AND_IN_USE


def rows_bytes(config: Config, layouts: RowLayouts) -> int:
    """The row buffers, each as large as a validation row; of hidden states in fp8, one training row in bfloat16 too."""
    train = layouts.train
    unpacked = 2 * len(train.layer_ids) * train.hidden_size if train.dtype == FP8 else 0
    return config.data.row_tokens * (row_buffers(config) * layouts.validation.bytes_per_token + unpacked)


def activation_bytes(spec: DrafterSpec, slots: int, tokens: int, number: int, *, recompute: bool = False) -> int:
    """What autograd keeps of one row from forward to backward, in bytes.

    With b = `number` bytes of the compute dtype, a slot keeps per layer
      4 b H                 the two norms' inputs and outputs
      + 3 b Hq D            q_proj's output, q itself, the attention's output
      + 3 b Hkv D           k_proj's output, k itself, v
      + 3 b I               gate, up, their product
      + 4 (2 + Hq + Hkv)    an fp32 statistic of each norm;
    and once 2 b H + 4 for the final norm and 2 b D for its cos and sin. A context token keeps 3 b Hkv D + 4 Hkv per
    layer and once b L H + 2 b H + 4 for fc and hidden_norm, and 2 b D. With `recompute` (activation checkpointing) a
    slot keeps b H per layer, its input, and one layer at a time keeps the rest.
    """
    layers = spec.layers
    hidden, inner, b = layers.hidden_size, layers.intermediate_size, number
    heads, kv_heads, head_dim = layers.num_attention_heads, cast(int, layers.num_key_value_heads), layers.head_dim
    slot_layer = b * (4 * hidden + 3 * (heads + kv_heads) * head_dim + 3 * inner) + 4 * (2 + heads + kv_heads)
    once = 2 * b * hidden + 4 + 2 * b * head_dim
    whole = 1 if recompute else layers.num_hidden_layers  # layers that are kept whole at once
    slot = whole * slot_layer + (layers.num_hidden_layers - whole) * b * hidden + once
    context = whole * (3 * b * head_dim + 4) * kv_heads
    context += b * len(spec.layer_ids) * spec.context_size + once
    return slots * slot + tokens * context


def attention_bytes(config: Config, spec: DrafterSpec, slots: int) -> int:
    """What the attention keeps for the backward beyond its inputs and output: one fp32 statistic per slot and head of
    every layer, of one layer with activation checkpointing. The reference keeps the fp32 weights of every slot, head
    and key instead, twice, because the product with the values keeps a copy of its own."""
    layers = 1 if config.train.activation_checkpointing else spec.layers.num_hidden_layers
    statistics = 4 * layers * spec.layers.num_attention_heads * slots
    if config.drafter.attention_backend != "reference":
        return statistics
    return 2 * statistics * (config.data.row_tokens + spec.block_size)


def loss_bytes(config: Config, spec: DrafterSpec, slots: int, vocabulary: int) -> int:
    """One chunk's logits, which become their gradient, and the verifier's where they are wanted; the slices of them
    that plain torch holds in fp32; the gradient of the hidden states of all slots, and in fp32 of the chunk."""
    number = 2 if config.train.precision == "bf16" else 4
    chunk = min(chunk_slots(config, vocabulary), slots)
    matrices = 2 if config.loss.needs_verifier else 1
    slices = TORCH_SLICES[loss_spec(config).soft] * min(SLICE_NUMBERS, chunk * vocabulary) * 4
    hidden = spec.layers.hidden_size
    return matrices * chunk * vocabulary * number + slices + slots * hidden * number + chunk * hidden * (4 + number)


def chunk_slots(config: Config, vocabulary: int) -> int:
    """Slots of a chunk on a GPU with memory to spare."""
    number = 2 if config.train.precision == "bf16" else 4
    matrices = 2 if config.loss.needs_verifier else 1
    return config.loss.chunk_slots or fitting_rows(CHUNK_BYTES["cuda"], matrices * vocabulary * number)
