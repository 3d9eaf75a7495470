"""The loss of rows of logits, and its gradient in their place: the operator, and the choice of its implementation.

For a row with logits z, p = softmax(z), label y and the verifier's distribution q, a loss is a weighted sum of

    ce -log p[y] · kl sum q log(q / p) · reverse_kl sum p log(p / q) · tv sum |p - q| / 2

The gradient has no row weight in it: it is linear in the row's weight, so that can come later, on fewer numbers.

n rows · V vocabulary · U rows of the verifier's logits.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from dflash_scale.attention import LIBRARY, MISSING

log = logging.getLogger(__name__)

TERMS = ("ce", "kl", "reverse_kl", "tv")
KERNELS = ("auto", "cuda", "cpu", "torch")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
SLICE_NUMBERS = 1 << 23  # logits that plain torch holds in fp32 at once
# "auto" takes the CUDA kernel only once tests/gpu/test_gpu_loss.py passed on a GPU; until then it has to be asked for.
CUDA_PROVEN = False
COMPILED = {
    device.lower(): not MISSING
    and torch._C._dispatch_has_kernel_for_dispatch_key("dflash_scale::softmax_loss_", device)
    for device in ("CPU", "CUDA")
}


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
        kernel: "cuda", "cpu" (compiled), "torch" (plain, any device and floating dtype), or "auto".

    Returns:
        values (n, 4), each term unweighted, 0 for a soft term whose weight is 0; ranks (n,) int32, the columns that
        come before the label in falling order, of equal ones the lower first: 0 where the argmax is the label. The
        statistics are fp32, fp64 for fp64 logits.

    Raises ValueError for a kernel that cannot run these logits: only "auto" ever takes another one.
    """
    chosen = choose(kernel, logits)
    soft = any(weights[1:])
    assert not soft or (verifier is not None and rows is not None), "a soft term needs the verifier's logits"
    if chosen == "torch":
        return _softmax_loss_torch(logits, labels, weights, verifier if soft else None, rows)
    other = _aligned(verifier, chosen) if soft and verifier is not None else logits[:0]
    index = rows if soft and rows is not None else labels[:0]
    return torch.ops.dflash_scale.softmax_loss_(logits, labels, other, index, list(weights))


def empty_logits(count: int, vocabulary: int, like: Tensor) -> Tensor:
    """(count, vocabulary) whose rows start at multiples of 16 bytes, as GPU kernels and GEMMs want them."""
    packet = 16 // like.element_size()
    return like.new_empty(count, -(-vocabulary // packet) * packet)[:, :vocabulary]


def _aligned(matrix: Tensor, kernel: str) -> Tensor:
    if kernel == "cpu" or (matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0):
        return matrix
    return empty_logits(matrix.shape[0], matrix.shape[1], matrix).copy_(matrix)


def choose(kernel: str, logits: Tensor) -> str:
    """The kernel that runs, never "auto"."""
    device = logits.device.type
    if kernel == "auto":
        reason = obstacle(device, logits) if device in DTYPES else "does not exist"
        if reason is None and device == "cuda" and not CUDA_PROVEN:
            reason = "has not been proven on a GPU yet"
        _log_choice(device, device if reason is None else "torch", reason)
        return device if reason is None else "torch"
    reason = obstacle(kernel, logits)
    if reason is not None:
        raise ValueError(f'loss.kernel: got "{kernel}", which {reason}; use "auto" or "torch"')
    return kernel


def obstacle(kernel: str, logits: Tensor) -> str | None:
    """Why a kernel cannot run these logits, as the rest of a sentence; None if it can."""
    if kernel not in KERNELS:
        return f"is none of {', '.join(KERNELS)}"
    if kernel == "torch":
        return None
    if logits.device.type != kernel:
        return f"does not run on {logits.device}"
    if not COMPILED[kernel]:
        return f"needs the compiled operators, but {MISSING or f'{LIBRARY.name} was built without nvcc'}"
    if logits.dtype not in DTYPES[kernel]:
        return f"takes {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES[kernel])}, got {logits.dtype}"
    return None


@functools.cache
def _log_choice(device: str, chosen: str, reason: str | None) -> None:
    log.info('loss on %s runs kernel "%s"%s', device, chosen, f': "{device}" {reason}' if reason else "")


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
    """Gradient (n, V), values (n, 4) and ranks (n,) of one slice."""
    valid = (labels >= 0) & (labels < z.shape[1])
    column = torch.where(valid, labels, 0)[:, None]
    own = z.gather(1, column)
    before = torch.arange(z.shape[1], device=z.device) < column
    ranks = ((z > own) | ((z == own) & before)).sum(1, dtype=torch.int32)
    log_p = z.log_softmax(1).masked_fill_(~valid[:, None], torch.nan)
    values = z.new_zeros(len(z), len(TERMS))
    values[:, 0] = -log_p.gather(1, column)[:, 0]
    gradient = log_p.exp().mul_(weights[0])
    if verifier is not None:
        gradient += _soft_slice(log_p, verifier.log_softmax(1), weights, values)
    gradient.scatter_add_(1, column, gradient.new_full(column.shape, -weights[0]))
    return gradient, values, ranks


def _soft_slice(log_p: Tensor, log_q: Tensor, weights: tuple[float, ...], values: Tensor) -> Tensor:
    """The soft terms' gradient (n, V); their values go into columns 1.. of `values`."""
    _, kl, reverse_kl, tv = weights
    p, q = log_p.exp(), log_q.exp()
    ratio = log_p - log_q
    gradient = torch.zeros_like(p)
    if kl:
        values[:, 1] = torch.where(q > 0, q * -ratio, 0).sum(1)
        gradient += kl * (p - q)
    if reverse_kl:
        values[:, 2] = torch.where(p > 0, p * ratio, 0).sum(1)
        gradient += torch.where(p > 0, reverse_kl * p * (ratio - values[:, 2:3]), 0)
    if tv:
        values[:, 3] = (p - q).abs().sum(1) / 2
        side = torch.where(log_p > log_q, 0.5, torch.where(log_p < log_q, -0.5, 0.0)).to(p.dtype)
        gradient += tv * p * (side - (p * side).sum(1, keepdim=True))
    return gradient


def _fake(
    logits: Tensor, labels: Tensor, verifier: Tensor, rows: Tensor, weights: list[float]
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), len(TERMS), dtype=torch.float32), torch.empty_like(labels)


if not MISSING:
    torch.library.register_fake("dflash_scale::softmax_loss_", _fake)
