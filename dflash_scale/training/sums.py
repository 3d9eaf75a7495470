"""What the loss sums up over blocks, and the means that metrics.jsonl tells of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dflash_scale.ops.softmax_loss import TERMS

TOP = (4, 8)  # a label among this many of the drafter's best tokens is a hit; 1 is `correct`


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Sums over blocks that add up over chunks, rows, micro-steps and ranks; fp32 on the loss's device.

    loss () sum of w*l · blocks () how many blocks · terms (len(TERMS),) sums of w times each · top (2,) labels among
    the drafter's best TOP tokens · compared, agreed () labels, and those that are the verifier's argmax, where the two
    were compared · trained, correct, accepted (S-1,) per slot 1..S-1: how many were trained, how many predicted their
    label, how many did with all slots before them right.
    """

    loss: Tensor
    blocks: Tensor
    compared: Tensor
    agreed: Tensor
    terms: Tensor
    top: Tensor
    trained: Tensor
    correct: Tensor
    accepted: Tensor

    def packed(self) -> Tensor:
        """One flat tensor, for one all-reduce."""
        return torch.cat([getattr(self, field.name).flatten() for field in fields(self)])

    @classmethod
    def unpacked(cls, flat: Tensor) -> BlockSums:
        """The inverse of `packed`."""
        slots = (len(flat) - cls.size(1)) // 3
        counts = {"terms": len(TERMS), "top": len(TOP), "trained": slots, "correct": slots, "accepted": slots}
        names = [field.name for field in fields(cls)]
        parts = dict(zip(names, flat.split([counts.get(name, 1) for name in names]), strict=True))
        return cls(**{name: part if name in counts else part[0] for name, part in parts.items()})

    @staticmethod
    def size(block_size: int) -> int:
        """Numbers in `packed`."""
        return 4 + len(TERMS) + len(TOP) + 3 * (block_size - 1)


def block_metrics(sums: BlockSums, normaliser: float) -> dict[str, Any]:
    """Means of reduced sums.

    Returns:
        loss, and each term that is in it, unweighted: ce, kl, reverse_kl, tv · accuracy (of trained slots) · top_4 and
        top_8, labels among the drafter's 4 and 8 best tokens · acceptance_length (tokens: mean leading correct run of a
        block, + 1) · accuracy_by_position and acceptance_by_position, lists over slots 1..S-1 · blocks ·
        verifier_agreement, the share of labels that are the verifier's argmax, where they were compared.
    """
    blocks = max(float(sums.blocks), 1.0)
    trained = sums.trained.clamp(min=1)
    slots = float(sums.trained.sum().clamp(min=1))
    terms = zip([term.name for term in TERMS], sums.terms.tolist(), strict=True)
    agreement = {"verifier_agreement": float(sums.agreed / sums.compared)} if sums.compared > 0 else {}
    return {
        "loss": float(sums.loss) / max(normaliser, 1e-12),
        **{name: total / max(normaliser, 1e-12) for name, total in terms if total},
        "accuracy": float(sums.correct.sum()) / slots,
        **{f"top_{k}": hits / slots for k, hits in zip(TOP, sums.top.tolist(), strict=True)},
        "acceptance_length": 1.0 + float(sums.accepted.sum()) / blocks,
        "accuracy_by_position": (sums.correct / trained).tolist(),
        "acceptance_by_position": (sums.accepted / blocks).tolist(),
        "blocks": int(sums.blocks),
        **agreement,
    }
