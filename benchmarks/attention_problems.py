"""The attention problems that bench_attention.py times, and what it times on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dflash_scale.ops.attention import ATTENTION, anchor_attention
from dflash_scale.ops.attention_flex import row_bounds
from dflash_scale.ops.attention_plan import Plan, build_plan

KERNELS = ("sm90", "sm80", "cpu")
OURS = (*KERNELS, "flex by plan")
Attend = Callable[..., Tensor]
BACKWARD_FLOP = 2.5  # of the forward's: five products for its two


def visible_pairs(plan: Plan) -> int:
    """Pairs of a query position and a key that the mask lets through, of one head."""
    bounds = row_bounds(plan)
    context = (bounds.context_high - bounds.context_low).clamp(min=0)
    return int(context.sum() + (bounds.own_high - bounds.own_low).sum())


@dataclass(frozen=True)
class Problem:
    """A packed row: documents of one length, anchors drawn evenly from all positions."""

    name: str
    tokens: int
    documents: int
    anchors: int
    block: int
    window: int | None = None
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    def plan(self, device: str) -> Plan:
        generator = torch.Generator().manual_seed(1)
        anchors = torch.sort(torch.randperm(self.tokens, generator=generator)[: self.anchors]).values
        documents = torch.arange(self.tokens) * self.documents // self.tokens
        return build_plan(
            anchors.int().to(device),
            documents.int().to(device),
            block_size=self.block,
            window=self.window,
            group=self.heads // self.key_heads,
        )

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        """q, k_ctx, v_ctx, k_blk, v_blk."""
        generator = torch.Generator(device).manual_seed(2)
        slots, dtype = self.anchors * self.block, getattr(torch, self.dtype)
        shapes = [(slots, self.heads), *[(self.tokens, self.key_heads)] * 2, *[(slots, self.key_heads)] * 2]
        return tuple(
            torch.randn(*shape, self.head_dim, generator=generator, device=device).to(dtype).requires_grad_()
            for shape in shapes
        )

    def flop(self, plan: Plan) -> tuple[float, float]:
        """Forward and backward."""
        forward = 4.0 * self.head_dim * self.heads * visible_pairs(plan)
        return forward, BACKWARD_FLOP * forward

    def bytes_moved(self, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
        """Forward: five inputs, one output. Backward: those six, the output's gradient, five gradients."""
        inputs, output = sum(x.numel() for x in tensors), tensors[0].numel()
        each = tensors[0].element_size()
        return float((inputs + output) * each), float((2 * inputs + 2 * output) * each)


GPU_PROBLEMS = (
    Problem("1 document", 8192, 1, 512, 16),
    Problem("4 documents", 8192, 4, 512, 16),
    Problem("12 documents", 8192, 12, 512, 16),
    Problem("4 documents, window 2048", 8192, 4, 512, 16, window=2048),
    Problem("32768 tokens", 32768, 1, 1024, 16),
    Problem("2048 tokens", 2048, 1, 512, 8),
)
CPU_PROBLEMS = tuple(
    Problem(f"{tokens} tokens, {dtype}", tokens, documents, anchors, 16, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for tokens, documents, anchors in ((4096, 8, 128), (1024, 2, 32))
)


def mask_function(plan: Plan) -> Callable[..., Tensor]:
    """The whole mask over (context | blocks), as a trainer would write it."""
    anchors, doc_ids, size = plan.anchors, plan.doc_ids, plan.block_size
    tokens, window = doc_ids.numel(), plan.window

    def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        block = row // size
        anchor = anchors[block]
        position = key.clamp(max=tokens - 1)
        context = (key < tokens) & (key < anchor) & (doc_ids[position] == doc_ids[anchor])
        own = (key >= tokens) & ((key - tokens) // size == block)
        if window is not None:
            context = context & (key > anchor + row % size - window)
            own = own & (row % size - (key - tokens) % size < window)
        return context | own

    return seen


def joined(context: Tensor, blocks: Tensor) -> Tensor:
    return torch.cat([context, blocks]).transpose(0, 1)[None]


def peers_flex(plan: Plan, blocks: BlockMask, compiled: Callable[..., Any]) -> Attend:
    def attend(q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor) -> Tensor:
        keys, values = joined(k_ctx, k_blk), joined(v_ctx, v_blk)
        out: Tensor = compiled(q.transpose(0, 1)[None], keys, values, block_mask=blocks, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def dense_sdpa(plan: Plan) -> Attend:
    rows, keys = plan.anchors.numel() * plan.block_size, plan.doc_ids.numel() + plan.anchors.numel() * plan.block_size
    device = plan.anchors.device
    at = torch.arange(rows, device=device)[:, None], torch.arange(keys, device=device)[None]
    mask = mask_function(plan)(at[0], at[0], *at)

    def attend(q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor) -> Tensor:
        keys, values = (joined(*x).repeat_interleave(plan.group, 1) for x in ((k_ctx, k_blk), (v_ctx, v_blk)))
        return F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, mask)[0].transpose(0, 1)

    return attend


def ours(plan: Plan, backend: str) -> Attend:
    def attend(q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor) -> Tensor:
        return anchor_attention(q, k_ctx, v_ctx, k_blk, v_blk, plan, backend=backend)

    return attend


def implementations(problem: Problem, plan: Plan, tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Attend]]:
    """Each is made when its turn comes: a dense mask may not fit."""
    found: dict[str, Callable[[], Attend]] = {}
    for name in OURS:
        backend = "flex" if name == "flex by plan" else name
        if ATTENTION.backend(backend).obstacle(tensors, plan, 1.0) is None:
            found[name] = lambda backend=backend: ours(plan, backend)  # type: ignore[misc]
    if plan.anchors.device.type == "cuda":
        rows = problem.anchors * problem.block
        shape = (1, 1, rows, problem.tokens + rows, str(plan.anchors.device))
        make = torch.compile(create_block_mask)
        found["flex"] = lambda: peers_flex(plan, make(mask_function(plan), *shape), torch.compile(flex_attention))
    found["sdpa"] = lambda: dense_sdpa(plan)
    return found
