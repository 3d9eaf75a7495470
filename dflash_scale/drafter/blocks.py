"""The blocks of a row: where one may start, which slots are trained, the draw that picks them, and the row's plan.

A position a of a document may be an anchor if tokens a and a+1 are both supervised: the anchor stands for a token
that the verifier sampled, and slot 1 must have something to predict. Slot k is trained if every token a+1..a+k is
supervised and in the same document, because serving never drafts past a gap or an end.

The draw for a document depends on (run seed, epoch, sample) alone - not on rank, packing, order or world size - so a
resumed run, and a run on another number of GPUs, sees the same anchors.

A anchors in a row · S block size · T tokens in a packed row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dflash_scale.data.dataset import Ints, Samples
from dflash_scale.data.schedule import Row
from dflash_scale.drafter.vocabulary import cut_at_unknown

# Stands where an epoch would in a validation draw: validation anchors are fixed once for the whole run.
VALIDATION_EPOCH = 2**31 - 1


def supervised_run(loss_mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """For every position a of one document, how many supervised tokens follow it without a gap.

    Args:
        loss_mask: (n,) bool, True where the token is supervised.

    Returns:
        (n,) int32; slot k of a block at anchor a is trained exactly if k <= run[a].
    """
    n = len(loss_mask)
    gaps = np.where(loss_mask, n, np.arange(n))
    next_gap = np.minimum.accumulate(np.append(gaps, n)[::-1])[::-1]  # first unsupervised position >= p
    return (next_gap[1:] - np.arange(n) - 1).astype(np.int32)


def draw_anchors(
    loss_mask: npt.NDArray[np.bool_], *, block_size: int, per_document: int, seed: Sequence[int]
) -> tuple[Ints, Ints]:
    """Draws one document's anchors without replacement, ascending; all valid positions if they are fewer.

    Args:
        loss_mask: (n,) bool of one document.
        block_size: S.
        per_document: the most anchors to draw.
        seed: (run seed, epoch, sample).

    Returns:
        anchors (A,) int32 positions in the document, and trained (A,) int32: slots 1..trained of that block are
        trained, the others are not.
    """
    run = supervised_run(loss_mask)
    valid = np.flatnonzero(loss_mask & (run >= 1))
    if len(valid) > per_document:
        valid = np.sort(np.random.default_rng(seed).choice(valid, per_document, replace=False))
    return valid.astype(np.int32), np.minimum(run[valid], block_size - 1).astype(np.int32)


@dataclass(frozen=True, slots=True)
class AnchorSpec:
    """What the anchors of a row depend on, the row aside."""

    block_size: int
    per_document: int
    seed: int
    inside: npt.NDArray[np.bool_] | None = None  # (V,) the drafter's vocabulary where it is pruned (vocabulary.py)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """All of a row that is known before its hidden states arrive (numpy, on the CPU).

    doc_ids, positions (T,) int32 with T the tokens in use · anchors, trained (A,) int32 (`draw_anchors`, in the row) ·
    block_tokens (A, S) int32: the tokens a..a+S-1, 0 in slots that are not trained · outside: slots that are not
    trained because they, or a slot before them, hold a token outside the drafter's vocabulary.
    """

    row: Row
    doc_ids: Ints
    positions: Ints
    anchors: Ints
    trained: Ints
    block_tokens: Ints
    outside: int = 0

    def without(self, samples: Collection[int]) -> RowPlan:
        """The plan without some of its samples: their tokens become padding, their anchors go."""
        if not samples:
            return self
        doc_ids = self.doc_ids.copy()
        for place in self.row.places:
            if place.sample in samples:
                doc_ids[place.start : place.start + place.length] = -1
        keep = doc_ids[self.anchors] >= 0
        return replace(
            self,
            doc_ids=doc_ids,
            anchors=self.anchors[keep],
            trained=self.trained[keep],
            block_tokens=self.block_tokens[keep],
        )


def plan_row(row: Row, samples: Samples, spec: AnchorSpec) -> RowPlan:
    """Lays the row out and draws its anchors; a row without samples has T = A = 0."""
    total = row.tokens
    tokens, positions, doc_ids = (np.zeros(total, np.int32) for _ in range(3))
    drawn = [(np.zeros(0, np.int32), np.zeros(0, np.int32))]
    epoch = VALIDATION_EPOCH if row.kind == "validation" else row.epoch
    for document, place in enumerate(row.places):
        here = slice(place.start, place.start + place.length)
        tokens[here] = samples.tokens(place.sample)
        doc_ids[here] = document
        positions[here] = np.arange(place.length)
        seed, mask = (spec.seed, epoch, place.sample), samples.loss_mask(place.sample)
        own, reach = draw_anchors(mask, block_size=spec.block_size, per_document=spec.per_document, seed=seed)
        drawn.append((own + np.int32(place.start), reach))
    anchors, trained = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    slots = np.arange(spec.block_size)
    at = np.minimum(anchors[:, None] + slots, max(total - 1, 0))
    supervised = int(trained.sum())
    if spec.inside is not None and total:
        # Anchors stay where they are without pruning, so that a block of which nothing is left counts in validation.
        trained = cut_at_unknown(tokens[at], trained, spec.inside).astype(np.int32)
    block_tokens = np.where(slots <= trained[:, None], tokens[at] if total else 0, 0).astype(np.int32)
    outside = supervised - int(trained.sum())
    return RowPlan(row, doc_ids, positions, anchors, trained, block_tokens, outside)
