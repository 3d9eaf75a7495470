"""RMSNorm, rotary embedding and gated SiLU: operators that keep little more than their inputs for the backward.

    rms_norm   y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension
    norm_rope  the same for each head, then the rotary embedding of the head
    silu_mul   silu(gate) * up

Autograd would keep what each step of these computes, norms in fp32: a third of a drafter's activations at Qwen3-8B's
shapes. Each operator has its definition beside it, one autograd rule, and under that two implementations: plain torch,
and CUDA kernels (csrc/pointwise). All arithmetic is in fp32 (fp64 for fp64) and rounded once.

N rows · H hidden size · D head dim · I width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_scale.ops.backends import Backend, Operator, dtype_name

DENSE = torch.contiguous_format
MOST_COLUMNS = 16384  # of a row that the CUDA kernel norms: shared memory holds the weight's gradient
MOST_HEAD_BYTES = 1024  # a warp has a head, each lane 16 bytes of both halves
PACKET = 16  # bytes that the CUDA kernels read at once
# Numbers of a tensor that plain torch works on, in fp32, at once: what a cache holds, what a launch is worth.
SLICE_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 23}


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, kernel: str = "auto") -> Tensor:
    """x (N, H), weight (H,) -> (N, H) in the dtype of x. Keeps x, weight and one statistic a row.

    kernel, here and below: a name of POINTWISE: "cuda", "torch" (any device and floating dtype), or "auto". Both repeat
    bit for bit. Raises ValueError for a kernel that cannot run these tensors: only "auto" ever takes another one.
    """
    return cast(Tensor, _Norm.apply(x, weight, eps, POINTWISE.choose(kernel, (x, weight), "rms_norm").run))


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *, kernel: str = "auto") -> Tensor:
    """RMSNorm of each head, then RoPE in the halves convention. Keeps its inputs and one statistic a head.

    x (N, heads, D), weight (D,), cos and sin (N, D) without gradient -> (N, heads, D) in the dtype of x.
    """
    chosen = POINTWISE.choose(kernel, (x, weight, cos, sin), "norm_rope")
    return cast(Tensor, _Norm.apply(x, weight, eps, chosen.run, cos, sin))


def silu_mul(gate: Tensor, up: Tensor, *, kernel: str = "auto") -> Tensor:
    """gate and up (N, I) of one dtype -> (N, I). Keeps gate and up."""
    return cast(Tensor, _SiluMul.apply(gate, up, POINTWISE.choose(kernel, (gate, up), "silu_mul").run))


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def norm_rope_definition(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    wide = _wide(x)
    y = rms_norm_definition(x.to(wide), weight.to(wide), eps)
    return _turned(y, cos[:, None].to(wide), sin[:, None].to(wide)).to(x.dtype)


def silu_mul_definition(gate: Tensor, up: Tensor) -> Tensor:
    wide = _wide(gate)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@dataclass(frozen=True)
class Kernels:
    """One implementation of the operators. A norm takes cos and sin behind its other arguments where it is norm_rope,
    and returns its result and the statistic that its backward takes; a backward takes dout first and returns the
    gradients."""

    norm: Callable[..., tuple[Tensor, Tensor]]
    norm_backward: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    silu_mul_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels, *rope: Tensor) -> Tensor:
        out, scales = kernels.norm(x, weight, eps, *rope)
        ctx.save_for_backward(x, weight, scales, *rope)
        ctx.kernels = kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.kernels.norm_backward(dout, *ctx.saved_tensors)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 2))


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.silu_mul(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernels.silu_mul_backward(dout, *ctx.saved_tensors), None)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(x.dtype, torch.float32)


def _slices(x: Tensor) -> Iterator[slice]:
    numbers = SLICE_NUMBERS["cpu" if x.device.type == "cpu" else "cuda"]
    step = max(1, numbers // max(1, math.prod(x.shape[1:])))
    return (slice(first, first + step) for first in range(0, len(x), step))


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=DENSE)


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


def _norm_torch(x: Tensor, weight: Tensor, eps: float, *rope: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    out, scales = _empty(x), x.new_empty(x.shape[:-1], dtype=wide)
    for rows in _slices(x):
        y, scales[rows] = _normed(x[rows].to(wide), weight.to(wide), eps)
        out[rows] = _turned(y, *(angle[rows, None].to(wide) for angle in rope)) if rope else y
    return out, scales


def _norm_backward_torch(
    dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor, *rope: Tensor
) -> tuple[Tensor, Tensor]:
    wide = scales.dtype
    dx, dweight = _empty(x), torch.zeros_like(weight, dtype=wide)
    for rows in _slices(x):
        dy = dout[rows].to(wide)
        if rope:
            dy = _turned_back(dy, *(angle[rows, None].to(wide) for angle in rope))
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


def _rows(x: Tensor) -> Tensor:
    """x, or a copy of it, so that rows have no gaps and start at multiples of 16 bytes."""
    whole = not len(x) or x[0].is_contiguous()
    return x if whole and x.stride(0) * x.element_size() % PACKET == 0 and _aligned(x) else x.clone(memory_format=DENSE)


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() and _aligned(x) else x.clone(memory_format=DENSE)


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % PACKET == 0


def _norm_cuda(x: Tensor, weight: Tensor, eps: float, *rope: Tensor) -> tuple[Tensor, Tensor]:
    operator = torch.ops.dflash_scale.norm_rope if rope else torch.ops.dflash_scale.rms_norm
    return operator(_rows(x), _dense(weight), *map(_dense, rope), eps)


def _norm_backward_cuda(
    dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor, *rope: Tensor
) -> tuple[Tensor, Tensor]:
    operator = torch.ops.dflash_scale.norm_rope_backward if rope else torch.ops.dflash_scale.rms_norm_backward
    return operator(_dense(dout), _rows(x), _dense(weight), scales, *map(_dense, rope))


def _silu_mul_cuda(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.dflash_scale.silu_mul(_rows(gate), _rows(up))


def _silu_mul_backward_cuda(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dflash_scale.silu_mul_backward(_dense(dout), _rows(gate), _rows(up))


def _cuda_limits(tensors: tuple[Tensor, ...], operator: str) -> str | None:
    """one dtype for all; rows of whole 16 bytes, heads of whole 32 up to 1024; norms of up to 16384 numbers"""
    x = tensors[0]
    size, packet = x.shape[-1] * x.element_size(), PACKET * (2 if operator == "norm_rope" else 1)
    if any(tensor.dtype != x.dtype for tensor in tensors):
        return f"takes one dtype for all, got {', '.join(dtype_name(tensor.dtype) for tensor in tensors)}"
    if size == 0 or size % packet:
        return f"takes sizes that are multiples of {packet} bytes, got {size}"
    if operator == "norm_rope" and size > MOST_HEAD_BYTES:
        return f"takes heads of up to {MOST_HEAD_BYTES} bytes, got {size}"
    if operator == "rms_norm" and x.shape[-1] > MOST_COLUMNS:
        return f"takes a norm of up to {MOST_COLUMNS} numbers, got {x.shape[-1]}"
    return None


POINTWISE = Operator[Kernels](
    name="pointwise",
    setting="drafter.pointwise",
    backends=(
        Backend(
            "cuda",
            Kernels(
                norm=_norm_cuda,
                norm_backward=_norm_backward_cuda,
                silu_mul=_silu_mul_cuda,
                silu_mul_backward=_silu_mul_backward_cuda,
            ),
            device="cuda",
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            capability=((8, 0), None),
            compiled=True,
            proof=None,  # tests/gpu/test_gpu_pointwise.py
            limits=_cuda_limits,
        ),
        Backend(
            "torch",
            Kernels(
                norm=_norm_torch,
                norm_backward=_norm_backward_torch,
                silu_mul=_silu_mul_torch,
                silu_mul_backward=_silu_mul_backward_torch,
            ),
        ),
    ),
)
