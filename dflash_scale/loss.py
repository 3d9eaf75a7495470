"""The drafter's loss: cross entropy of the trained slots, in chunks, so that (A*S, V) logits never exist.

The head is frozen, so a chunk needs two products: its logits, and from them the gradient of its hidden states, made
in the forward and kept; there is no recomputation and no gradient of the head.

Position weights w_k of slot k (1 <= k < S): `decay`, exp(-(k-1)/gamma) (DFlash, arXiv 2602.06036); or `dpace`
(arXiv 2605.18810): q_k the drafter's probability of the label, s_k = (1-alpha) q_k + alpha, P_k = prod_{i<=k} s_i,
w_k = sum_{j>=k} P_j over the trained slots, without gradient.
The loss is sum(w l) / Z, where Z (`normaliser`) is summed over all rows of the optimizer step, on all ranks.

A anchors in a row · S block size · N trained slots · H hidden size · V drafter vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossSpec:
    """How slots are weighted. `gamma` in slots (decay), `alpha` in (0, 1] (dpace), `chunk_slots` logit rows at once."""

    weights: Literal["decay", "dpace"] = "decay"
    gamma: float = 7.0
    alpha: float = 0.5
    chunk_slots: int = 2048

    def decay(self, block_size: int) -> npt.NDArray[np.float64]:
        """(S-1,) fixed weights of slots 1..S-1; ones for dpace, whose weights depend on the logits."""
        k = np.arange(block_size - 1)
        return np.exp(-k / self.gamma) if self.weights == "decay" else np.ones(block_size - 1)


def normaliser(trained: npt.NDArray[np.int32], block_size: int, spec: LossSpec) -> float:
    """This row's part of Z, known before the forward. trained (A,): slots 1..trained[j] of block j are trained."""
    reach = np.concatenate([[0.0], np.cumsum(spec.decay(block_size))])
    return float(reach[trained].sum())


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Sums over blocks that add up over chunks, rows, micro-steps and ranks; all fp32 on the loss's device.

    loss () sum of w*l · trained, correct, accepted (S-1,) per slot 1..S-1: how many were trained, how many predicted
    their label, how many did with all slots before them right · blocks () how many blocks.
    """

    loss: Tensor
    trained: Tensor
    correct: Tensor
    accepted: Tensor
    blocks: Tensor

    def packed(self) -> Tensor:
        """One flat tensor, for one all-reduce."""
        return torch.cat([self.loss[None], self.blocks[None], self.trained, self.correct, self.accepted])

    @classmethod
    def unpacked(cls, flat: Tensor) -> "BlockSums":
        """The inverse of `packed`."""
        trained, correct, accepted = flat[2:].chunk(3)
        return cls(flat[0], trained, correct, accepted, flat[1])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole blocks: their trained slots' hidden states (n, H), labels (n,), and where they lie in (blocks, S-1)."""

    hidden: Tensor
    labels: Tensor
    block: Tensor
    slot: Tensor
    shape: tuple[int, int]

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """(n,) -> (blocks, S-1), `fill` in untrained slots."""
        grid = values.new_full(self.shape, fill)
        grid[self.block, self.slot] = values
        return grid


def slot_weights(chunk: Chunk, label_logp: Tensor, spec: LossSpec) -> Tensor:
    """(n,) weights without gradient. label_logp (n,) fp32: log probability of each slot's label."""
    if spec.weights == "decay":
        fixed = torch.as_tensor(spec.decay(chunk.shape[1] + 1), device=label_logp.device, dtype=label_logp.dtype)
        return fixed[chunk.slot]
    smooth = (1 - spec.alpha) * label_logp.exp() + spec.alpha
    reach = chunk.spread(smooth, 1.0).cumprod(dim=1) * chunk.spread(torch.ones_like(smooth), 0.0)
    return reach.flip(1).cumsum(1).flip(1)[chunk.block, chunk.slot]


def chunk_sums(chunk: Chunk, weighted: Tensor, right: Tensor) -> BlockSums:
    """weighted (n,) w*l, right (n,) bool, in the order of the chunk."""
    grid = chunk.spread(right.float(), 0.0)
    trained = chunk.spread(torch.ones_like(grid[chunk.block, chunk.slot]), 0.0).sum(0)
    blocks = weighted.new_full((), chunk.shape[0])
    return BlockSums(weighted.sum(), trained, grid.sum(0), grid.cumprod(1).sum(0), blocks)


def chunks(
    hidden: Tensor, labels: Tensor, trained: npt.NDArray[np.int32], chunk_slots: int
) -> Iterator[tuple[Tensor, Chunk]]:
    """Splits a row into chunks of whole blocks with at most about `chunk_slots` trained slots.

    Untrained slots (slot 0 among them) are left out here, before the head. All bounds come from `trained`, which is
    on the CPU, so nothing waits for the device.

    Yields:
        index (n,) rows of `hidden`, and the chunk.
    """
    count, size = labels.shape
    on = np.arange(1, size) <= trained[:, None]  # (A, S-1)
    ends = np.cumsum(on.sum(1))
    start = 0
    while start < count:
        used = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + chunk_slots, side="right")))
        block, slot = (torch.from_numpy(a).to(hidden.device, non_blocking=True) for a in np.nonzero(on[start:stop]))
        index = (start + block) * size + slot + 1
        flat = labels.flatten().index_select(0, index).long()
        yield index, Chunk(hidden.index_select(0, index), flat, block, slot, (stop - start, size - 1))
        start = stop


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss with the gradient of the hidden states made in the forward."""

    @staticmethod
    def forward(ctx, hidden, head, labels, trained, spec, scale):  # type: ignore[no-untyped-def]
        grad = torch.zeros_like(hidden)
        total = hidden.new_zeros(2 + 3 * (labels.shape[1] - 1), dtype=torch.float32)
        for index, chunk in chunks(hidden, labels, trained, spec.chunk_slots):
            logits = (chunk.hidden @ head.T).float()
            right = logits.argmax(dim=1) == chunk.labels
            norm = logits.logsumexp(dim=1)
            label_logp = logits.gather(1, chunk.labels[:, None])[:, 0] - norm
            weights = slot_weights(chunk, label_logp, spec)
            total += chunk_sums(chunk, -weights * label_logp, right).packed()
            probs = logits.sub_(norm[:, None]).exp_()
            probs.scatter_add_(1, chunk.labels[:, None], probs.new_full((len(probs), 1), -1.0))
            grad[index] = (probs.mul_((weights * scale)[:, None]).to(head.dtype) @ head).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(total)
        return total[0] * scale, total

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None, None


def drafter_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, trained: npt.NDArray[np.int32], spec: LossSpec, scale: Tensor
) -> tuple[Tensor, BlockSums]:
    """The loss of one row and its sums.

    Args:
        hidden: (A*S, H) drafter output after its final norm.
        head: (V, H), frozen.
        labels: (A, S) token ids; label k is what slot k must predict; column 0 and untrained slots are not read.
        trained: (A,) int32 on the CPU: slots 1..trained[j] are trained.
        spec: weights and chunking.
        scale: () factor of the sum, 1/Z (times what the engine divides by).

    Returns:
        scale * sum(w l), differentiable in `hidden` alone, and the row's `BlockSums`.
    """
    loss, total = ChunkedCrossEntropy.apply(hidden, head, labels, trained, spec, scale)
    return loss, BlockSums.unpacked(total)


def drafter_loss_reference(
    hidden: Tensor, head: Tensor, labels: Tensor, trained: npt.NDArray[np.int32], spec: LossSpec, scale: Tensor
) -> tuple[Tensor, BlockSums]:
    """The text-book form of `drafter_loss` for A >= 1: all logits at once, gradient by autograd."""
    _, chunk = next(chunks(hidden, labels, trained, chunk_slots=labels.numel()))
    losses = F.cross_entropy((chunk.hidden @ head.T).float(), chunk.labels, reduction="none")
    with torch.no_grad():
        weights = slot_weights(chunk, -losses, spec)
        right = (chunk.hidden @ head.T).argmax(dim=1) == chunk.labels
        sums = chunk_sums(chunk, weights * losses, right)
    return (weights * losses).sum() * scale, sums
