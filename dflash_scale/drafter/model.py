"""The drafter: Qwen3-style layers whose blocks attend to the verifier's hidden states and to themselves.

The block's slots are the queries: slot 0 holds the anchor's token, the others the mask token. Context keys and values
come from the verifier: c = hidden_norm(fc(L hidden states)), shared by all layers and changed by none; each layer
projects c with the same k and v weights as its own block (vLLM, model_executor/models/qwen3_dflash.py). Parameter names
are the ones vLLM loads. The verifier's embedding and head are not part of this module: they are frozen and kept once.

T tokens in a packed row · A anchors in it · S block size · N slots kept · L aux layers · H hidden size ·
Hq/Hkv heads · D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dflash_scale.ops.attention import anchor_attention
from dflash_scale.ops.attention_plan import Plan, build_plan
from dflash_scale.ops.pointwise import norm_rope, rms_norm, silu_mul
from dflash_scale.verifier.rope import check_rope, drafter_rope

if TYPE_CHECKING:
    from dflash_scale.config.run import DrafterSection
    from dflash_scale.verifier.shape import VerifierShape


@dataclass(frozen=True)
class DrafterSpec:
    """What defines a drafter, its weights aside.

    `layers` is the Qwen3 dictionary of the drafter's own layers (vLLM's `transformer_layer_config`), `layer_ids` the
    verifier's aux layers (id k = residual after k decoder layers), `context_size` the verifier's hidden size.
    """

    layers: Qwen3Config
    layer_ids: tuple[int, ...]
    context_size: int
    block_size: int
    mask_token_id: int
    causal_block: bool = False

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer in tokens, None where it attends to the whole context."""
        sliding = (self.layers.layer_types or [])[layer] == "sliding_attention"
        return cast(int, self.layers.sliding_window) if sliding else None


def drafter_spec(
    section: DrafterSection, verifier: VerifierShape, layer_ids: tuple[int, ...], mask_token_id: int
) -> DrafterSpec:
    """The drafter that the configuration asks for; what it leaves open is the verifier's.

    Raises:
        ValueError: the heads that the two together give do not fit each other.
    """
    kinds = section.layer_types or ("full_attention",) * section.layers
    head_dim = section.head_dim or verifier.head_dim
    rope = check_rope(section.rope_parameters) if section.rope_parameters is not None else None
    layers = Qwen3Config(
        vocab_size=verifier.vocab_size,
        hidden_size=verifier.hidden_size,
        intermediate_size=section.intermediate_size or verifier.intermediate_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads or verifier.heads,
        num_key_value_heads=section.kv_heads or verifier.kv_heads,
        head_dim=head_dim,
        max_position_embeddings=verifier.max_position_embeddings,
        rms_norm_eps=verifier.rms_norm_eps,
        rope_parameters=rope or drafter_rope(verifier.rope_parameters, head_dim),
        use_sliding_window=section.sliding_window is not None,
        sliding_window=section.sliding_window,
        layer_types=list(kinds),
        tie_word_embeddings=False,
    )
    heads, kv_heads = layers.num_attention_heads, cast(int, layers.num_key_value_heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"drafter: got {heads} heads of {head_dim} and {kv_heads} key heads, wanted "
            "heads of an even size, as many as a multiple of the key heads; set drafter.heads, drafter.kv_heads and "
            "drafter.head_dim, which the verifier gave where they are null"
        )
    return DrafterSpec(layers, layer_ids, verifier.hidden_size, section.block_size, mask_token_id, section.causal_block)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 (as vLLM's kernel does)."""

    def __init__(self, size: int, eps: float, kernel: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, kernel=self.kernel)


class HeadNorm(RMSNorm):
    """RMSNorm of each head, and then its rotary embedding. x (N, heads, D), cos and sin (N, D)."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        return norm_rope(x, self.weight, self.eps, cos, sin, kernel=self.kernel)


@dataclass(frozen=True)
class Rope:
    """cos and sin, (T, D) at the context's positions and (A*S, D) at the slots'."""

    context: tuple[Tensor, Tensor]
    block: tuple[Tensor, Tensor]


def pick(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of x, all of them for None."""
    return x if rows is None else x.index_select(0, rows)


class Attention(nn.Module):
    """Block queries over context keys and block keys."""

    def __init__(self, config: Qwen3Config, backend: str, pointwise: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = cast(int, config.num_key_value_heads)
        self.head_dim = config.head_dim
        self.backend = backend
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = HeadNorm(self.head_dim, config.rms_norm_eps, pointwise)
        self.k_norm = HeadNorm(self.head_dim, config.rms_norm_eps, pointwise)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x (N, H) -> keys and values (N, Hkv, D)."""
        shape = (len(x), self.kv_heads, self.head_dim)
        return self.k_norm(self.k_proj(x).view(shape), *rope), self.v_proj(x).view(shape)

    def forward(self, x: Tensor, context: Tensor, rope: Rope, plan: Plan, kept: Tensor | None) -> Tensor:
        """x (A*S, H), context (T, H) -> (A*S, H), or (N, H) with kept (N,)."""
        q = self.q_norm(self.q_proj(x).view(len(x), self.heads, self.head_dim), *rope.block)
        k_ctx, v_ctx = self.keys_values(context, rope.context)
        k_blk, v_blk = self.keys_values(x, rope.block)
        out = anchor_attention(q, k_ctx, v_ctx, k_blk, v_blk, plan, backend=self.backend)
        return self.o_proj(pick(out.flatten(1), kept))


class MLP(nn.Module):
    """Gated SiLU."""

    def __init__(self, config: Qwen3Config, pointwise: str) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x), kernel=self.pointwise))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: Qwen3Config, backend: str, pointwise: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, pointwise)
        self.self_attn = Attention(config, backend, pointwise)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, pointwise)
        self.mlp = MLP(config, pointwise)

    def forward(self, x: Tensor, context: Tensor, rope: Rope, plan: Plan, kept: Tensor | None = None) -> Tensor:
        x = pick(x, kept) + self.self_attn(self.input_layernorm(x), context, rope, plan, kept)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):
    """All trainable weights of a drafter.

    Args:
        spec: its definition.
        backend: attention backend (`attention.anchor_attention`).
        pointwise: kernel of norms, rotary embedding and SiLU (pointwise.py).
        recompute: activation checkpointing: of each layer autograd keeps the input alone, and the backward computes the
            rest again, to the same bits.
    """

    def __init__(
        self, spec: DrafterSpec, backend: str = "auto", pointwise: str = "auto", *, recompute: bool = False
    ) -> None:
        super().__init__()
        config = spec.layers
        self.spec = spec
        self.recompute = recompute
        self.fc = nn.Linear(len(spec.layer_ids) * spec.context_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, pointwise)
        self.layers = nn.ModuleList(Layer(config, backend, pointwise) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, pointwise)
        # Hidden from .to() and .bfloat16(): frequencies rounded to bf16 would turn far positions by whole radians.
        self._rotary = (Qwen3RotaryEmbedding(config),)

    def initialise(self, seed: int) -> None:
        """Draws every matrix uniform in +-1/sqrt(fan in), in fp32 on the CPU.

        The bound follows the width, so that at any hidden size a layer's output starts at the scale of its input. A
        fixed standard deviation of 0.02 is 1.8 times too small at hidden 256, where this bound has 0.036.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    bound = 1 / math.sqrt(parameter.shape[1])
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def plans(self, anchors: Tensor, doc_ids: Tensor) -> dict[int | None, Plan]:
        """One attention plan per distinct window. anchors (A,) int32, doc_ids (T,) int32."""
        windows = {self.spec.window(layer) for layer in range(len(self.layers))}
        size, causal = self.spec.block_size, self.spec.causal_block
        group = self.spec.layers.num_attention_heads // cast(int, self.spec.layers.num_key_value_heads)
        return {
            window: build_plan(anchors, doc_ids, block_size=size, window=window, causal_block=causal, group=group)
            for window in windows
        }

    def slot_positions(self, positions: Tensor, anchors: Tensor) -> Tensor:
        """RoPE positions of the slots, (A*S,), from those of the row (T,)."""
        slots = torch.arange(self.spec.block_size, device=positions.device, dtype=positions.dtype)
        return (positions[anchors.long()][:, None] + slots).flatten()

    def forward(
        self,
        slots: Tensor,
        states: Tensor,
        positions: Tensor,
        anchors: Tensor,
        doc_ids: Tensor,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Runs all blocks of one row.

        Args:
            slots: (A*S, H) embeddings of the block inputs (`block_inputs`).
            states: (T, L * verifier's H), the hidden states of the aux layers side by side.
            positions: (T,) int32, restarting at 0 in each document.
            anchors: (A,) int32 ascending positions in the row.
            doc_ids: (T,) int32, -1 = padding.
            kept: (N,) the slots whose output is wanted, without repeats. In the last layer all slots are keys, but what
                follows its attention mixes no slots and is done for these alone.

        Returns:
            (A*S, H), or (N, H) with `kept`, after the final norm, ready for the head.
        """
        plans = self.plans(anchors, doc_ids)
        context = self.hidden_norm(self.fc(states))
        rope = Rope(self.rotation(context, positions), self.rotation(slots, self.slot_positions(positions, anchors)))
        x = slots
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            inputs = (x, context, rope, plans[self.spec.window(index)], kept if index == last else None)
            if self.recompute and torch.is_grad_enabled():
                # Nothing random is in a layer, so no generator's state has to be kept and put back.
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*inputs)
        return self.norm(x)

    def rotation(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, D) in the dtype of `like` at `positions` (N,)."""
        cos, sin = self._rotary[0].to(like.device)(like[None], positions[None].long())
        return cos[0], sin[0]


def block_inputs(embedding: Tensor, anchor_tokens: Tensor, spec: DrafterSpec) -> Tensor:
    """The slots' embeddings (A*S, H): the anchor's token, then S-1 mask tokens.

    Args:
        embedding: (V, H), the verifier's.
        anchor_tokens: (A,) token ids.
    """
    ids = anchor_tokens.new_full((len(anchor_tokens), spec.block_size), spec.mask_token_id)
    ids[:, 0] = anchor_tokens
    return F.embedding(ids.flatten().long(), embedding)
