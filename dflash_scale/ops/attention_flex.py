"""FlexAttention fed by the plan: any GPU that Triton compiles for, without a mask that is evaluated to be built.

T tokens in a packed row · A anchors · S block size · Hq/Hkv query and key heads · D head dim
U = ceil(A*S/128) query tiles · N key tiles

Keys are one tensor: the context, padded to whole tiles of 128 so that no tile holds both kinds, then all blocks' own
rows. Every query row sees one interval of each part, so the lists of key tiles that FlexAttention wants follow from the
intervals' bounds by arithmetic on tensors. torch's own way (`create_block_mask`) evaluates the mask at all A*S * (T +
A*S) places in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dflash_scale.ops.attention_plan import TILE, Plan
from dflash_scale.ops.attention_reference import attention_reference


def attention_flex(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Compiled on CUDA. On the CPU it runs eagerly, with dense scores and, by torch's decision, without gradients."""
    if plan.anchors.shape[0] == 0:  # FlexAttention takes no empty tensors
        return attention_reference(q, k_ctx, v_ctx, k_blk, v_blk, plan, scale)
    attend = _compiled() if q.device.type == "cuda" else cast(Callable[..., Any], flex_attention)
    keys, values = _join(k_ctx, k_blk), _join(v_ctx, v_blk)
    queries = q.transpose(0, 1)[None]
    # Few queries would go to a kernel for decoding, which has no tiling for many of the group sizes (torch 2.13).
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    out = attend(
        queries, keys, values, block_mask=block_mask(plan), scale=scale, enable_gqa=True, kernel_options=options
    )
    return cast(Tensor, out)[0].transpose(0, 1).contiguous()


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Lengths differ from row to row: after the second one they are symbols, and nothing is compiled again.
    return torch.compile(flex_attention, fullgraph=True)


def _join(context: Tensor, blocks: Tensor) -> Tensor:
    """(T, Hkv, D) and (A*S, Hkv, D) -> (1, Hkv, T padded + A*S, D)."""
    padding = context.new_zeros(-context.shape[0] % TILE, *context.shape[1:])
    return torch.cat([context, padding, blocks]).transpose(0, 1)[None]


def block_mask(plan: Plan) -> BlockMask:
    """The plan as FlexAttention takes it; made once per plan, with no host sync. A must not be 0."""
    if torch.compiler.is_compiling():
        return _block_mask(plan)
    if "block_mask" not in plan.derived:
        plan.derived["block_mask"] = _block_mask(plan)
    return cast(BlockMask, plan.derived["block_mask"])


@dataclass(frozen=True)
class Bounds:
    """The keys that each query row sees: low <= key < high, (A*S,) int32 each, in the joined tensor."""

    context_low: Tensor
    context_high: Tensor
    own_low: Tensor
    own_high: Tensor


def row_bounds(plan: Plan) -> Bounds:
    """Per query row, from the plan's intervals per block."""
    size, device = plan.block_size, plan.starts.device
    own_begin = _tiles(plan.doc_ids.shape[0]) * TILE
    slot = torch.arange(size, dtype=torch.int32, device=device)
    first = own_begin + size * torch.arange(plan.anchors.shape[0], dtype=torch.int32, device=device)[:, None]
    low = plan.starts[:, None].expand(-1, size)
    own_low, own_high = torch.zeros_like(slot), torch.full_like(slot, size)
    if plan.window is not None:
        # The window counts back from the query itself.
        low = torch.maximum(low, plan.ends[:, None] + slot - plan.window + 1)
        own_low = (slot - plan.window + 1).clamp(min=0)
    if plan.causal_block:
        own_high = slot + 1
    high = plan.ends[:, None].expand(-1, size)
    return Bounds(
        context_low=low.reshape(-1).contiguous(),
        context_high=high.reshape(-1).contiguous(),
        own_low=(first + own_low).reshape(-1).contiguous(),
        own_high=(first + own_high).reshape(-1).contiguous(),
    )


def tile_masks(plan: Plan, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Key tiles that need the mask, and key tiles that a query tile sees whole, (U, N) bool each.

    A tile that is listed as partial may turn out to be unseen: where a block's rows fall into two query tiles, each is
    given what any of the block's slots sees.
    """
    rows, tokens = bounds.own_low.shape[0], plan.doc_ids.shape[0]
    device, contexts = plan.starts.device, _tiles(tokens)
    begins = TILE * torch.arange(contexts + _tiles(rows), dtype=torch.int32, device=device)
    first_rows = TILE * torch.arange(_tiles(rows), device=device)
    last_rows = (first_rows + TILE - 1).clamp(max=rows - 1)

    # Context: a query tile sees a key tile if the blocks that it holds rows of and those that see the key tile, both of
    # them ranges, have one in common that sees anything at all. Of blocks 0..j-1, `seeing[j]` do.
    seeing = torch.nn.functional.pad((plan.ends > plan.starts).cumsum(0), (1, 0))
    first = torch.maximum((first_rows // plan.block_size)[:, None], plan.tile_ranges[:, 0])
    last = torch.minimum((last_rows // plan.block_size + 1)[:, None], plan.tile_ranges[:, 1])
    seen_context = (first < last) & (seeing[last] > seeing[torch.minimum(first, last)])
    # Own rows: each row sees itself, so the intervals of a query tile's rows leave no gap: one interval is all of them.
    own_low, own_high = _extremes(bounds.own_low, bounds.own_high, widest=True)
    seen_own = (own_low[:, None] < begins[contexts:] + TILE) & (own_high[:, None] > begins[contexts:])
    seen = torch.cat([seen_context, seen_own], dim=1)

    # Whole: every row's interval covers the key tile, that is, what all of them have in common does.
    whole = torch.zeros_like(seen)
    for low, high in ((bounds.context_low, bounds.context_high), (bounds.own_low, bounds.own_high)):
        low, high = _extremes(low, high, widest=False)
        whole |= (low[:, None] <= begins) & (high[:, None] >= begins + TILE)
    # FlexAttention would take the rows that a last, shorter tile lacks as rows that see everything.
    whole &= (first_rows + TILE <= rows)[:, None]
    return seen & ~whole, whole


def _block_mask(plan: Plan) -> BlockMask:
    bounds = row_bounds(plan)
    partial, whole = (_ordered(tiles) for tiles in tile_masks(plan, bounds))
    context_low, context_high = bounds.context_low, bounds.context_high
    own_low, own_high = bounds.own_low, bounds.own_high

    # Captures tensors only: a captured number would be a constant of the compiled kernel.
    def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= context_low[row]) & (key < context_high[row])
        return in_context | ((key >= own_low[row]) & (key < own_high[row]))

    lengths = (own_low.shape[0], _tiles(plan.doc_ids.shape[0]) * TILE + own_low.shape[0])
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=TILE, mask_mod=seen, seq_lengths=lengths)


def _tiles(count: int) -> int:
    return (count + TILE - 1) // TILE


def _extremes(low: Tensor, high: Tensor, *, widest: bool) -> tuple[Tensor, Tensor]:
    """Per query tile the lowest low and highest high of its rows, or the highest low and lowest high; (U,) each."""
    count = low.shape[0]
    # A shorter last tile repeats a row that it holds.
    rows = torch.arange(_tiles(count) * TILE, device=low.device).clamp(max=count - 1).view(-1, TILE)
    low, high = low[rows], high[rows]
    return (low.amin(1), high.amax(1)) if widest else (low.amax(1), high.amin(1))


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(U, N) bool -> how many tiles each row has, (1, 1, U), and their indices in front, (1, 1, U, N), both int32."""
    indices = torch.argsort(tiles.int(), dim=1, descending=True, stable=True)
    return tiles.sum(1).int()[None, None], indices.int()[None, None]
