"""Parts of a training step as other trainers of such drafters do them; bench_train.py swaps them in for this library's.

attention   over (context | blocks) as one tensor, with a mask made in every step from the whole mask function: on a GPU
            FlexAttention and a compiled create_block_mask; on a CPU, where FlexAttention has no gradients, torch's own
            attention with a dense mask
logits      all at once, with torch's own losses and autograd
anchors     a fixed number in every row, and all of their slots through all layers and the head; what is not trained is
            masked out of the loss

A anchors in a row · S block size · N trained slots · H hidden size · V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.attention_problems import Attend, dense_sdpa, mask_function, peers_flex
from benchmarks.train_cases import Row
from dflash_scale.drafter.heads import OutputHead
from dflash_scale.ops.attention_plan import Plan
from dflash_scale.training.loss import LossSpec, drafter_loss

Loss = Callable[[Tensor, Tensor], Tensor]  # hidden states and scale -> the row's loss


@dataclass(frozen=True)
class Variant:
    """Which parts of the step are a peer's."""

    name: str
    attention: bool = False
    full_logits: bool = False
    padded: bool = False


OURS: Final = Variant("ours")
TOGETHER: Final = Variant("as a peer would", attention=True, full_logits=True, padded=True)
PEERS: Final = (
    Variant("peers' attention", attention=True),
    Variant("full logits", full_logits=True),
    Variant("padded anchors", padded=True),
    TOGETHER,
)


def peers_attention(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan, *, backend: str
) -> Tensor:
    """In the place of `anchor_attention`. The plan lives for one step, and with it the mask that its layers share."""
    if "peers" not in plan.derived:
        plan.derived["peers"] = _flex(plan) if q.is_cuda else dense_sdpa(plan)
    attend: Attend = plan.derived["peers"]
    return attend(q, k_ctx, v_ctx, k_blk, v_blk)


def _flex(plan: Plan) -> Attend:
    rows, tokens = plan.anchors.numel() * plan.block_size, plan.doc_ids.numel()
    make, attend = _compiled()
    return peers_flex(plan, make(mask_function(plan), 1, 1, rows, tokens + rows, str(plan.anchors.device)), attend)


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Their rows are all of one size, so each case is compiled for its own.
    return torch.compile(create_block_mask, dynamic=False), torch.compile(flex_attention, dynamic=False)


def make_loss(variant: Variant, row: Row, head: Tensor, spec: LossSpec) -> Loss:
    """Takes the drafter's output of the trained slots (N, H), or with padded anchors of all (A*S, H)."""
    if variant.full_logits:
        return _full(row, head, spec, every=variant.padded)
    return _masked(row, head, spec) if variant.padded else _chunked(row, head, spec)


def _chunked(row: Row, head: Tensor, spec: LossSpec) -> Loss:
    verifier = row.verifier(head) if spec.soft else None

    def loss(hidden: Tensor, scale: Tensor) -> Tensor:
        return drafter_loss(hidden, OutputHead(head), row.labels, row.trained, spec, scale, verifier)[0]

    return loss


def _masked(row: Row, head: Tensor, spec: LossSpec) -> Loss:
    """This library's loss of all slots: of those that are not trained at a scale of zero."""
    # One slot more in front, because the loss takes no slot 0, which these rows compute like any other.
    mask = np.ones((len(row.labels), row.labels.shape[1]), bool)
    mask[:, 1:] = ~row.trained
    labels = F.pad(row.labels, (1, 0))
    # A masked slot may lie beyond the row's end.
    verifier = replace(row, last=F.pad(row.last, (0, 0, 0, mask.shape[1]))).verifier(head)
    rest = torch.from_numpy(np.flatnonzero(mask)).to(row.kept)
    order = torch.cat([row.kept, rest])
    trained = _chunked(row, head, spec)

    def loss(hidden: Tensor, scale: Tensor) -> Tensor:
        kept, others = hidden.index_select(0, order).split([len(row.kept), len(rest)])
        targets = verifier if spec.soft else None
        masked = drafter_loss(others, OutputHead(head), labels, mask, spec, torch.zeros_like(scale), targets)
        return trained(kept, scale) + masked[0]

    return loss


def _full(row: Row, head: Tensor, spec: LossSpec, *, every: bool) -> Loss:
    """`every`: of all slots, with a weight of zero for those that are not trained."""
    device, width = row.labels.device, row.labels.shape[1]
    slots = torch.arange(row.labels.numel(), device=device) if every else row.kept
    decay = np.concatenate([[0.0], spec.decay(width)]) * np.pad(row.trained, ((0, 0), (1, 0)))
    weights = torch.from_numpy(decay.ravel()).to(device, torch.float32)[slots]
    labels = row.labels.flatten()[slots].long()
    positions = row.anchors.repeat_interleave(width)[slots] + slots % width - 1
    states = row.last[positions.clamp(0, len(row.last) - 1)] if spec.soft else None

    def loss(hidden: Tensor, scale: Tensor) -> Tensor:
        logits = hidden @ head.T
        if states is None:
            values = F.cross_entropy(logits, labels, reduction="none")
        else:
            with torch.no_grad():
                target = (states @ head.T).log_softmax(1)
            values = F.kl_div(logits.log_softmax(1), target, reduction="none", log_target=True).sum(1)
        return (values.float() * weights).sum() * scale

    return loss
