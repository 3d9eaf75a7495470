"""RMSNorm, rotary embedding and gated SiLU: operators that keep little more than their inputs for the backward.

    rms_norm   y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension
    norm_rope  the same for each head, then the rotary embedding of the head
    silu_mul   silu(gate) * up

Autograd would keep what each step of these computes, norms in fp32: a third of a drafter's activations at Qwen3-8B's
shapes. Each operator has one autograd rule, its definition beside it, and all arithmetic in fp32 (fp64 for fp64),
rounded once.

N rows · H hidden size · D head dim · I width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers of a tensor that plain torch works on, in fp32, at once: what a cache holds, what a launch is worth.
SLICE_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 23}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (N, H), weight (H,) -> (N, H) in the dtype of x. Keeps x, weight and one statistic a row."""
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm of each head, then RoPE in the halves convention. Keeps its inputs and one statistic a head.

    x (N, heads, D), weight (D,), cos and sin (N, D) without gradient -> (N, heads, D) in the dtype of x.
    """
    return cast(Tensor, _NormRope.apply(x, weight, eps, cos, sin))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up (N, I) of one dtype -> (N, I). Keeps gate and up."""
    return cast(Tensor, _SiluMul.apply(gate, up))


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def norm_rope_definition(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    wide = _wide(x)
    y = F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)
    return _turned(y, cos[:, None].to(wide), sin[:, None].to(wide)).to(x.dtype)


def silu_mul_definition(gate: Tensor, up: Tensor) -> Tensor:
    wide = _wide(gate)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scales = _rms_norm_torch(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*_rms_norm_backward_torch(dout, *ctx.saved_tensors), None)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        out, scales = _norm_rope_torch(x, weight, eps, cos, sin)
        ctx.save_for_backward(x, weight, scales, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*_norm_rope_backward_torch(dout, *ctx.saved_tensors), None, None, None)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_mul_torch(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        return _silu_mul_backward_torch(dout, *ctx.saved_tensors)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(x.dtype, torch.float32)


def _slices(x: Tensor) -> Iterator[slice]:
    numbers = SLICE_NUMBERS["cpu" if x.device.type == "cpu" else "cuda"]
    step = max(1, numbers // max(1, math.prod(x.shape[1:])))
    return (slice(first, first + step) for first in range(0, len(x), step))


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _turned(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=-1)
    return y * cos + torch.cat((-second, first), dim=-1) * sin


def _turned_back(dout: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of `_turned` by y."""
    first, second = (dout * sin).chunk(2, dim=-1)
    return dout * cos + torch.cat((second, -first), dim=-1)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x (..., H), and 1 / rms (...)."""
    scales = (x.square().mean(-1) + eps).rsqrt()
    return x * scales[..., None] * weight, scales


def _normed_backward(dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `_normed` by x (..., H) and weight (H,)."""
    unit = x * scales[..., None]
    product = dout * unit
    dweight = product.flatten(0, -2).sum(0)
    mean = product.mul_(weight).mean(-1, keepdim=True)
    return (dout * weight - unit * mean) * scales[..., None], dweight


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    out, scales = _empty(x), x.new_empty(x.shape[:-1], dtype=wide)
    for rows in _slices(x):
        out[rows], scales[rows] = _normed(x[rows].to(wide), weight.to(wide), eps)
    return out, scales


def _rms_norm_backward_torch(dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    wide = scales.dtype
    dx, dweight = _empty(x), torch.zeros_like(weight, dtype=wide)
    for rows in _slices(x):
        dx[rows], part = _normed_backward(dout[rows].to(wide), x[rows].to(wide), weight.to(wide), scales[rows])
        dweight += part
    return dx, dweight.to(weight.dtype)


def _norm_rope_torch(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    out, scales = _empty(x), x.new_empty(x.shape[:-1], dtype=wide)
    for rows in _slices(x):
        y, scales[rows] = _normed(x[rows].to(wide), weight.to(wide), eps)
        out[rows] = _turned(y, cos[rows, None].to(wide), sin[rows, None].to(wide))
    return out, scales


def _norm_rope_backward_torch(
    dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    wide = scales.dtype
    dx, dweight = _empty(x), torch.zeros_like(weight, dtype=wide)
    for rows in _slices(x):
        dy = _turned_back(dout[rows].to(wide), cos[rows, None].to(wide), sin[rows, None].to(wide))
        dx[rows], part = _normed_backward(dy, x[rows].to(wide), weight.to(wide), scales[rows])
        dweight += part
    return dx, dweight.to(weight.dtype)


def _silu_mul_torch(gate: Tensor, up: Tensor) -> Tensor:
    wide, out = _wide(gate), _empty(gate)
    for rows in _slices(gate):
        out[rows] = F.silu(gate[rows].to(wide)) * up[rows].to(wide)
    return out


def _silu_mul_backward_torch(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide, dgate, dup = _wide(gate), _empty(gate), _empty(up)
    for rows in _slices(gate):
        g, d = gate[rows].to(wide), dout[rows].to(wide)
        dup[rows] = d * F.silu(g)
        dgate[rows] = torch.ops.aten.silu_backward(d * up[rows].to(wide), g)
    return dgate, dup
