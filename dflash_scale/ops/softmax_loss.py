"""The loss of rows of logits, and its gradient in their place: the operator, and the choice of its implementation.

For a row with logits z, p = softmax(z), label y and the verifier's distribution q, a loss is a weighted sum of TERMS.
Their gradients have no row weight in them: they are linear in it, so the caller multiplies it in after the product with
the head, on (n, H) numbers instead of (n, V).

n rows · V vocabulary · U rows of the verifier's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_scale.ops.backends import Backend, Operator
from dflash_scale.ops.library import MISSING

SLICE_NUMBERS = 1 << 23  # logits that plain torch holds in fp32 at once


@dataclass(frozen=True)
class Rows:
    """What a term is a function of: the drafter's log p and p (n, V), labels (n,) int64, and the verifier's log q and
    q (n, V), empty where no soft term is wanted."""

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor
    labels: Tensor

    @classmethod
    def of(cls, log_p: Tensor, labels: Tensor, verifier: Tensor | None) -> Rows:
        """log_p (n, V) · the verifier's logits (n, V)."""
        log_q = log_p[:0] if verifier is None else verifier.log_softmax(1)
        return cls(log_p=log_p, p=log_p.exp(), log_q=log_q, q=log_q.exp(), labels=labels)


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    name: its key in the configuration's loss.terms, and in the metrics
    value: rows -> (n,), its definition, which autograd can differentiate: every implementation is held to it
    add_gradient: (total, rows, weight, value) adds weight * its gradient by z to `total` (n, V), in place
    soft: whether it needs the verifier's logits
    compiled: whether the compiled kernels have it, at the same place as in TERMS (`Term` in csrc/loss/softmax.h)
    """

    name: str
    value: Callable[[Rows], Tensor]
    add_gradient: Callable[[Tensor, Rows, float, Tensor], object]
    soft: bool = True
    compiled: bool = False


def _ce(rows: Rows) -> Tensor:
    """-log p[y]"""
    return -rows.log_p.gather(1, rows.labels[:, None])[:, 0]


def _add_ce(total: Tensor, rows: Rows, weight: float, value: Tensor) -> None:
    total += weight * rows.p
    label = rows.labels[:, None]
    total.scatter_add_(1, label, total.new_full(label.shape, -weight))


def _kl(rows: Rows) -> Tensor:
    """sum q log(q / p)"""
    return (rows.q * torch.where(rows.q > 0, rows.log_q - rows.log_p, 0)).sum(1)


def _add_kl(total: Tensor, rows: Rows, weight: float, value: Tensor) -> None:
    total += weight * (rows.p - rows.q)


def _reverse_kl(rows: Rows) -> Tensor:
    """sum p log(p / q)"""
    return (rows.p * torch.where(rows.p > 0, rows.log_p - rows.log_q, 0)).sum(1)


def _add_reverse_kl(total: Tensor, rows: Rows, weight: float, value: Tensor) -> None:
    ratio = rows.log_p - rows.log_q
    total += torch.where(rows.p > 0, weight * rows.p * (ratio - value[:, None]), 0)


def _tv(rows: Rows) -> Tensor:
    """sum |p - q| / 2"""
    return (rows.p - rows.q).abs().sum(1) / 2


def _add_tv(total: Tensor, rows: Rows, weight: float, value: Tensor) -> None:
    above, below = rows.log_p > rows.log_q, rows.log_p < rows.log_q
    side = torch.where(above, 0.5, torch.where(below, -0.5, 0.0)).to(rows.p.dtype)
    total += weight * rows.p * (side - (rows.p * side).sum(1, keepdim=True))


# The compiled ones first, in the order of the kernels.
TERMS = (
    Term("ce", _ce, _add_ce, soft=False, compiled=True),
    Term("kl", _kl, _add_kl, compiled=True),
    Term("reverse_kl", _reverse_kl, _add_reverse_kl, compiled=True),
    Term("tv", _tv, _add_tv, compiled=True),
)
CE = [term.name for term in TERMS].index("ce")  # column of `values`: minus the label's log probability
COMPILED_TERMS = sum(term.compiled for term in TERMS)


def term_weights(weights: Mapping[str, float]) -> tuple[float, ...]:
    """One weight per term of TERMS, by their names; 0 for a term that is not named."""
    unknown = set(weights) - {term.name for term in TERMS}
    assert not unknown, f"no terms of the loss: {unknown}"
    return tuple(weights.get(term.name, 0.0) for term in TERMS)


def wants_verifier(weights: tuple[float, ...]) -> bool:
    """Whether a soft term has a weight."""
    return any(weight for term, weight in zip(TERMS, weights, strict=True) if term.soft)


def softmax_loss_(
    logits: Tensor,
    labels: Tensor,
    weights: tuple[float, ...],
    verifier: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Overwrites logits with the gradient of the weighted sum of the terms.

    Args:
        logits: (n, V) contiguous in V; `empty_logits` makes rows that suit every kernel.
        labels: (n,) int32. A label outside [0, V) makes its row NaN.
        weights: one per term of TERMS.
        verifier: (U, V) of the dtype of logits, wanted if a soft term's weight is not 0.
        rows: (n,) int32, each row's row of `verifier`.
        kernel: a name of LOSS: "cuda", "cpu" (compiled), "torch" (plain, any device and floating dtype), or "auto".

    Returns:
        values (n, len(TERMS)), each term unweighted, ce in any case, another one 0 where its weight is 0; ranks (n,)
        int32, the columns that come before the label in falling order, of equal ones the lower first: 0 where the
        argmax is the label. The statistics are fp32, fp64 for fp64 logits.

    Raises ValueError for a kernel that cannot run these logits: only "auto" ever takes another one.
    """
    chosen = LOSS.choose(kernel, (logits,), weights)
    if not wants_verifier(weights):
        return chosen.run(logits, labels, weights, None, None)
    assert verifier is not None and rows is not None, "a soft term needs the verifier's logits"
    return chosen.run(logits, labels, weights, verifier, rows)


def empty_logits(count: int, vocabulary: int, like: Tensor) -> Tensor:
    """(count, vocabulary) whose rows start at multiples of 16 bytes, as GPU kernels and GEMMs want them."""
    packet = 16 // like.element_size()
    return like.new_empty(count, -(-vocabulary // packet) * packet)[:, :vocabulary]


def _aligned(matrix: Tensor) -> Tensor:
    if matrix.device.type == "cpu" or (
        matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    ):
        return matrix
    return empty_logits(matrix.shape[0], matrix.shape[1], matrix).copy_(matrix)


def _lacks_a_term(tensors: tuple[Tensor, ...], weights: tuple[float, ...]) -> str | None:
    """the terms that are compiled"""
    lacking = [term.name for term, weight in zip(TERMS, weights, strict=True) if weight and not term.compiled]
    return f"has no {', '.join(lacking)}" if lacking else None


def _softmax_loss_compiled(
    logits: Tensor, labels: Tensor, weights: tuple[float, ...], verifier: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    other = _aligned(verifier) if verifier is not None else logits[:0]
    index = rows if rows is not None else labels[:0]
    compiled = list(weights[:COMPILED_TERMS])
    values, ranks = torch.ops.dflash_scale.softmax_loss_(logits, labels, other, index, compiled)
    return torch.nn.functional.pad(values, (0, len(TERMS) - COMPILED_TERMS)), ranks


def _softmax_loss_torch(
    logits: Tensor, labels: Tensor, weights: tuple[float, ...], verifier: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    statistics = torch.promote_types(logits.dtype, torch.float32)
    values = logits.new_zeros(len(logits), len(TERMS), dtype=statistics)
    ranks = torch.empty_like(labels)
    step = max(1, SLICE_NUMBERS // logits.shape[1])
    for first in range(0, len(logits), step):
        here = slice(first, first + step)
        z = logits[here].to(statistics)
        other = None
        if verifier is not None and rows is not None:
            other = verifier.index_select(0, rows[here]).to(statistics)
        gradient, values[here], ranks[here] = _slice_loss(z, labels[here].long(), weights, other)
        logits[here] = gradient
    return values, ranks


def _slice_loss(
    z: Tensor, labels: Tensor, weights: tuple[float, ...], verifier: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (n, V), values (n, len(TERMS)) and ranks (n,) of one slice."""
    valid = (labels >= 0) & (labels < z.shape[1])
    labels = torch.where(valid, labels, 0)
    column = labels[:, None]
    own = z.gather(1, column)
    before = torch.arange(z.shape[1], device=z.device) < column
    ranks = ((z > own) | ((z == own) & before)).sum(1, dtype=torch.int32)
    log_p = z.log_softmax(1).masked_fill_(~valid[:, None], torch.nan)
    slice_rows = Rows.of(log_p, labels, verifier)
    values = z.new_zeros(len(z), len(TERMS))
    gradient = torch.zeros_like(z)
    # ce last: it takes its weight off the sum at the label.
    for place, term in sorted(enumerate(TERMS), key=lambda item: item[0] == CE):
        if weights[place] or place == CE:
            values[:, place] = term.value(slice_rows)
            term.add_gradient(gradient, slice_rows, weights[place], values[:, place])
    return gradient, values, ranks


LossRun = Callable[[Tensor, Tensor, tuple[float, ...], Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
LOSS = Operator[LossRun](
    name="loss",
    setting="loss.kernel",
    backends=(
        Backend(
            "cuda",
            _softmax_loss_compiled,
            device="cuda",
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            capability=((8, 0), None),
            compiled=True,
            proof=None,  # tests/gpu/test_gpu_loss.py
            limits=_lacks_a_term,
        ),
        Backend(
            "cpu",
            _softmax_loss_compiled,
            device="cpu",
            dtypes=(torch.float32, torch.bfloat16),
            compiled=True,
            limits=_lacks_a_term,
        ),
        Backend("torch", _softmax_loss_torch),
    ),
)


def _fake(
    logits: Tensor, labels: Tensor, verifier: Tensor, rows: Tensor, weights: list[float]
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), len(weights), dtype=torch.float32), torch.empty_like(labels)


if not MISSING:
    torch.library.register_fake("dflash_scale::softmax_loss_", _fake)
