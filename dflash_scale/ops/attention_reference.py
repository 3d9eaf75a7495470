"""The attention's definition: softmax under a dense mask, in plain torch, for any device and floating dtype.

T tokens in a packed row · A anchors · S block size · Hq/Hkv query and key heads, Hq = G * Hkv · D head dim

Every other implementation is held to this one, and this one to a loop over the mask's rules
(tests/ops/test_attention.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_scale.ops.attention_plan import Plan


def visible_context(plan: Plan) -> Tensor:
    """The context mask of the definition, (A, S, T) bool; what the plan's intervals stand for."""
    anchor = plan.anchors.long()[:, None, None]
    slot = torch.arange(plan.block_size, device=anchor.device)[None, :, None]
    position = torch.arange(plan.doc_ids.numel(), device=anchor.device)[None, None, :]
    same_document = (plan.doc_ids[None, :] == plan.doc_ids[plan.anchors][:, None])[:, None, :]
    seen = same_document & (position < anchor)
    if plan.window is None:
        return seen.expand(-1, plan.block_size, -1)
    return seen & (position > anchor + slot - plan.window)


def visible_block(plan: Plan) -> Tensor:
    """The mask inside a block, (S, S) bool: query slot, key slot."""
    slot = torch.arange(plan.block_size, device=plan.anchors.device)
    back = slot[:, None] - slot[None, :]
    seen = torch.ones_like(back, dtype=torch.bool)
    if plan.causal_block:
        seen = back >= 0
    if plan.window is not None:
        seen = seen & (back < plan.window)
    return seen


def attention_reference(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Softmax attention under the dense mask; half precisions are computed in float32."""
    anchors, size, tokens = plan.anchors.numel(), plan.block_size, plan.doc_ids.numel()
    heads, key_heads, width = q.shape[1], k_ctx.shape[1], q.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(compute).view(anchors, size, key_heads, heads // key_heads, width)
    blocks_k, blocks_v = (x.to(compute).view(anchors, size, key_heads, width) for x in (k_blk, v_blk))
    scores = torch.cat(
        [
            torch.einsum("ashgd,thd->ashgt", queries, k_ctx.to(compute)),
            torch.einsum("ashgd,ajhd->ashgj", queries, blocks_k),
        ],
        dim=-1,
    )
    seen = torch.cat([visible_context(plan), visible_block(plan).expand(anchors, -1, -1)], dim=-1)
    scores = (scores * scale).masked_fill(~seen[:, :, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    out = torch.einsum("ashgt,thd->ashgd", weights[..., :tokens], v_ctx.to(compute))
    out = out + torch.einsum("ashgj,ajhd->ashgd", weights[..., tokens:], blocks_v)
    return out.reshape(anchors * size, heads, width).to(q.dtype)
