"""The drafter's loss over the trained slots, in chunks, so that (A*S, V) logits never exist.

The head is frozen, so a chunk needs two products: its logits, and from them the gradient of its hidden states, made
in the forward and kept; there is no recomputation and no gradient of the head. Between the two, one kernel
(softmax_loss.py) overwrites the logits with their gradient. The verifier's logits, where a soft term or its argmax
needs them, are made once for each position that a chunk's slots predict from: slot k at anchor a, position a+k-1.

Position weights w_k of slot k (1 <= k < S): `decay`, exp(-(k-1)/gamma) (DFlash, arXiv 2602.06036); or `dpace`
(arXiv 2605.18810): q_k the drafter's probability of the label, s_k = (1-alpha) q_k + alpha, P_k = prod_{i<=k} s_i,
w_k = sum_{j>=k} P_j over the trained slots, without gradient.
The loss is sum(w l) / Z, where Z (`normaliser`) is summed over all rows of the optimizer step, on all ranks.

A anchors in a row · S block size · N trained slots, n of a chunk · T tokens in the row · H hidden size · V drafter
vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dflash_scale.drafter.heads import OutputHead
from dflash_scale.ops.softmax_loss import CE, TERMS, Rows, empty_logits, softmax_loss_, term_weights, wants_verifier
from dflash_scale.training.sums import TOP, BlockSums

if TYPE_CHECKING:
    from dflash_scale.config.run import Config

# Bytes of logits held at once where loss.chunk_slots is null. The products are as fast as they get well below both.
CHUNK_BYTES = {"cuda": 320 << 20, "cpu": 64 << 20}
FREE_SHARE = 8  # on a GPU at most this part of the free memory
CHUNK_SLOTS = (16, 2048)  # bounds of the choice

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LossSpec:
    """What the loss is. `gamma` in slots (decay), `alpha` in (0, 1] (dpace), `terms` one weight per term of TERMS,
    `chunk_slots` logit rows at once, None = by memory; `kernel` as in `softmax_loss_`."""

    weights: Literal["decay", "dpace"] = "decay"
    gamma: float = 7.0
    alpha: float = 0.5
    chunk_slots: int | None = None
    terms: tuple[float, ...] = term_weights({"ce": 1.0})
    labels: Literal["data", "verifier"] = "data"
    kernel: str = "auto"

    def decay(self, block_size: int) -> npt.NDArray[np.float64]:
        """(S-1,) fixed weights of slots 1..S-1; ones for dpace, whose weights depend on the logits."""
        k = np.arange(block_size - 1)
        return np.exp(-k / self.gamma) if self.weights == "decay" else np.ones(block_size - 1)

    @property
    def soft(self) -> bool:
        """Whether a term compares with the verifier's logits."""
        return wants_verifier(self.terms)


def loss_spec(config: "Config") -> LossSpec:
    """The loss that the configuration asks for."""
    loss = config.loss
    return LossSpec(
        weights=loss.weights,
        gamma=config.gamma,
        alpha=loss.dpace_alpha,
        chunk_slots=loss.chunk_slots,
        terms=term_weights(loss.terms.weights),
        labels=loss.labels,
        kernel=loss.kernel,
    )


def trained_mask(trained: Ints, block_size: int) -> Mask:
    """(A, S-1) slots 1..S-1 that are trained, from `RowPlan.trained` (A,): slots 1..trained[j] of block j."""
    return np.arange(1, block_size) <= trained[:, None]


def kept_slots(trained: Mask) -> npt.NDArray[np.int64]:
    """(N,) which of the A*S slots are trained, ascending. trained (A, S-1)."""
    block, slot = np.nonzero(trained)
    return block * (trained.shape[1] + 1) + slot + 1


def normaliser(trained: Mask, spec: LossSpec) -> float:
    """This row's part of Z, known before the forward. trained (A, S-1)."""
    return float(trained.sum(0) @ spec.decay(trained.shape[1] + 1))


@dataclass(frozen=True, slots=True)
class VerifierStates:
    """What gives the verifier's logits at any position of a row.

    states (T, H') of the last layer · anchors (A,) on the CPU · logits (n, H') -> (n, V), scaled and capped as the
    verifier's are.
    """

    states: Tensor
    anchors: Ints
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole blocks.

    rows: their trained slots among the N · labels (n,) the data's · block, slot (n,) where they lie in the grid
    (blocks, S-1) · positions (m,) the different positions that they predict from, source (n,) which of them.
    """

    rows: slice
    labels: Tensor
    block: Tensor
    slot: Tensor
    grid: tuple[int, int]
    positions: Tensor | None = None
    source: Tensor | None = None

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """(n,) -> (blocks, S-1), `fill` in untrained slots."""
        grid = values.new_full(self.grid, fill)
        grid[self.block, self.slot] = values
        return grid


@functools.cache
def constants(spec: LossSpec, block_size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The fixed weights of the slots (S-1,) and those of the terms; a copy for each chunk would wait for the
    device."""
    slots = torch.as_tensor(spec.decay(block_size), device=device, dtype=dtype)
    return slots, torch.as_tensor(spec.terms, device=device, dtype=dtype)


def slot_weights(chunk: Chunk, label_logp: Tensor, spec: LossSpec) -> Tensor:
    """(n,) weights without gradient. label_logp (n,): log probability of each slot's label."""
    if spec.weights == "decay":
        return constants(spec, chunk.grid[1] + 1, label_logp.device, label_logp.dtype)[0][chunk.slot]
    smooth = (1 - spec.alpha) * label_logp.exp() + spec.alpha
    reach = chunk.spread(smooth, 1.0).cumprod(dim=1) * chunk.spread(torch.ones_like(smooth), 0.0)
    return reach.flip(1).cumsum(1).flip(1)[chunk.block, chunk.slot]


def chunk_sums(
    chunk: Chunk, weights: Tensor, values: Tensor, ranks: Tensor, spec: LossSpec, *, agreed: Tensor | None
) -> BlockSums:
    """weights (n,), values (n, len(TERMS)) and ranks (n,) of `softmax_loss_`, in the order of the chunk; agreed () as
    `LossInputs.targets` gives it."""
    terms = (weights[:, None] * values).sum(0)
    loss = terms @ constants(spec, chunk.grid[1] + 1, terms.device, terms.dtype)[1]
    right = chunk.spread((ranks == 0).to(values.dtype), 0.0)
    trained = chunk.spread(torch.ones_like(weights), 0.0).sum(0)
    top = torch.stack([(ranks < k).sum() for k in TOP]).to(values.dtype)
    none = torch.zeros_like(loss)
    return BlockSums(
        loss=loss,
        blocks=torch.full_like(loss, chunk.grid[0]),
        compared=torch.full_like(loss, len(ranks)) if agreed is not None else none,
        agreed=agreed.to(loss) if agreed is not None else none,
        terms=terms,
        top=top,
        trained=trained,
        correct=right.sum(0),
        accepted=right.cumprod(1).sum(0),
    )


@functools.cache
def chosen_chunk(device: torch.device, row_bytes: int) -> int:
    """Logit rows at once where the configuration leaves them open, a power of two; chosen once in a process.

    On a GPU it depends on the memory that is free at the first step, but only where that is short.
    """
    limit = CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"]
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = min(limit, (torch.cuda.mem_get_info(device)[0] + unused) // FREE_SHARE)
    return fitting_rows(limit, row_bytes)


def fitting_rows(limit: int, row_bytes: int) -> int:
    """The largest power of two of rows that fit `limit` bytes, within CHUNK_SLOTS."""
    least, most = CHUNK_SLOTS
    return min(most, 1 << max(limit // row_bytes, least).bit_length() - 1)


def chunks(labels: Tensor, trained: Mask, chunk_slots: int, anchors: Ints | None) -> Iterator[Chunk]:
    """Splits a row into chunks of whole blocks with at most about `chunk_slots` trained slots.

    Blocks ascend by anchor, so that a position that several blocks predict from falls into one chunk, or two at a
    border. All bounds come from `trained` and `anchors`, which are on the CPU, so nothing waits for the device.
    """
    count, width = trained.shape
    ends = np.cumsum(trained.sum(1))
    start = 0
    while start < count:
        used = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + chunk_slots, side="right")))
        block, slot = np.nonzero(trained[start:stop])
        arrays = [block, slot, (start + block) * (width + 1) + slot + 1]
        if anchors is not None:
            arrays += np.unique(anchors[start + block] + slot, return_inverse=True)  # slot 0 here is slot 1
        on_device = [torch.from_numpy(array).to(labels.device, non_blocking=True) for array in arrays]
        own = labels.flatten().index_select(0, on_device[2]).int()
        places = (on_device[3], on_device[4].int()) if anchors is not None else (None, None)
        grid, rows = (stop - start, width), slice(used, int(ends[stop - 1]))
        yield Chunk(rows, own, on_device[0], on_device[1], grid, *places)
        start = stop


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The arguments of `drafter_loss` that have no gradient."""

    head: OutputHead
    labels: Tensor
    trained: Mask
    spec: LossSpec
    verifier: VerifierStates | None

    def chunks(self) -> Iterator[Chunk]:
        row_bytes = self.head.vocab_size * self.head.dtype.itemsize * (2 if self.verifier is not None else 1)
        size = self.spec.chunk_slots or chosen_chunk(self.labels.device, row_bytes)
        anchors = self.verifier.anchors if self.verifier is not None else None
        return chunks(self.labels, self.trained, size, anchors)

    def verifier_logits(self, chunk: Chunk) -> Tensor:
        """(m, V) at the chunk's positions."""
        assert self.verifier is not None and chunk.positions is not None
        logits = self.verifier.logits(self.verifier.states.index_select(0, chunk.positions))
        if logits.shape[1] != self.head.vocab_size:
            raise ValueError(
                f"the verifier's logits are {logits.shape[1]} wide, wanted {self.head.vocab_size} as the drafter's; "
                "give them over the drafter's vocabulary"
            )
        return logits.to(self.head.dtype)

    def targets(self, chunk: Chunk, *, compare: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The chunk's labels (n,), the verifier's logits (m, V) if it has any, and if `compare`, () how many of the
        data's labels are the verifier's argmax."""
        if self.verifier is None:
            return chunk.labels, None, None
        logits = self.verifier_logits(chunk)
        hard = self.spec.labels == "verifier"
        if not hard and not compare:
            return chunk.labels, logits, None
        own = logits.argmax(1).int()[chunk.source]
        return own if hard else chunk.labels, logits, (own == chunk.labels).sum() if compare else None


class ChunkedLoss(torch.autograd.Function):
    """The loss with the gradient of the hidden states made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scale: Tensor, given: LossInputs) -> tuple[Tensor, Tensor]:
        training, head = ctx.needs_input_grad[0], given.head
        statistics = torch.promote_types(head.dtype, torch.float32)
        grad = torch.zeros_like(hidden) if training else None
        total = hidden.new_zeros(BlockSums.size(given.labels.shape[1]), dtype=statistics)
        for chunk in given.chunks():
            labels, verifier, agreed = given.targets(chunk, compare=not training)
            part = hidden[chunk.rows].to(head.dtype)
            logits = head.logits(part, out=empty_logits(len(part), head.vocab_size, part))
            values, ranks = softmax_loss_(
                logits, labels, given.spec.terms, verifier, chunk.source, kernel=given.spec.kernel
            )
            weights = slot_weights(chunk, -values[:, CE], given.spec)
            total += chunk_sums(chunk, weights, values, ranks, given.spec, agreed=agreed).packed()
            if grad is not None:
                torch.mul(head.hidden_grad(logits), (weights * scale)[:, None], out=grad[chunk.rows])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(total)
        return BlockSums.unpacked(total).loss * scale, total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None


def drafter_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    trained: Mask,
    spec: LossSpec,
    scale: Tensor,
    verifier: VerifierStates | None = None,
) -> tuple[Tensor, BlockSums]:
    """The loss of one row and its sums.

    Args:
        hidden: (N, H) drafter output of the trained slots (`kept_slots`), after its final norm.
        head: of V rows; its dtype, or autocast's, is the one that the logits have.
        labels: (A, S) the data's token ids; label k is what slot k must predict; untrained slots are not read.
        trained: (A, S-1) on the CPU: which of slots 1..S-1 are trained.
        spec: terms, weights and chunking.
        scale: () factor of the sum, 1/Z (times what the engine divides by).
        verifier: wanted by soft terms and the verifier's labels; without a gradient to make, it is also compared with
            the labels.

    Returns:
        scale * sum(w l), differentiable in `hidden` alone, and the row's `BlockSums`. Repeats bit for bit for one chunk
        size; another one changes it by rounding alone.
    """
    _check(hidden, trained, spec, verifier)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        head = head.to(dtype=torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        loss, total = ChunkedLoss.apply(hidden, scale, LossInputs(head, labels, trained, spec, verifier))
    return loss, BlockSums.unpacked(total)


def _check(hidden: Tensor, trained: Mask, spec: LossSpec, verifier: VerifierStates | None) -> None:
    if len(hidden) != trained.sum():
        raise ValueError(
            f"hidden has {len(hidden)} rows, wanted the {trained.sum()} trained slots; index by kept_slots"
        )
    if verifier is None and (spec.soft or spec.labels == "verifier"):
        raise ValueError("a soft term or the verifier's labels need its states, got none; give `verifier`")


def drafter_loss_reference(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    trained: Mask,
    spec: LossSpec,
    scale: Tensor,
    verifier: VerifierStates | None = None,
) -> tuple[Tensor, BlockSums]:
    """The text-book form of `drafter_loss` for A >= 1: all logits at once, gradient by autograd."""
    _check(hidden, trained, spec, verifier)
    given = LossInputs(head, labels, trained, spec, verifier)
    (chunk,) = chunks(labels, trained, trained.size + 1, verifier.anchors if verifier is not None else None)
    targets, other, agreed = given.targets(chunk, compare=not hidden.requires_grad)
    logits = head.logits(hidden).to(torch.promote_types(head.dtype, torch.float32))
    values = term_values(logits, targets.long(), other[chunk.source].to(logits) if other is not None else None)
    with torch.no_grad():
        weights = slot_weights(chunk, -values[:, CE], spec)
        order = logits.argsort(dim=1, descending=True, stable=True)
        ranks = (order == targets[:, None]).int().argmax(1)
        wanted = torch.tensor(
            [bool(weight) or place == CE for place, weight in enumerate(spec.terms)], device=values.device
        )
        sums = chunk_sums(chunk, weights, torch.where(wanted, values, 0), ranks, spec, agreed=agreed)
    loss = sum(weight * values[:, term] for term, weight in enumerate(spec.terms) if weight)
    return (weights * loss).sum() * scale, sums


def term_values(logits: Tensor, labels: Tensor, verifier: Tensor | None) -> Tensor:
    """(n, len(TERMS)) by their definitions, differentiable in logits. Soft terms are 0 without `verifier` (n, V)."""
    rows = Rows.of(logits.log_softmax(1), labels, verifier)
    none = logits.new_zeros(len(logits))
    return torch.stack([none if term.soft and verifier is None else term.value(rows) for term in TERMS], 1)
