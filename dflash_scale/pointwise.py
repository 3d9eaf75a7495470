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

import functools
import logging
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflash_scale.attention import LIBRARY, MISSING

log = logging.getLogger(__name__)

DENSE = torch.contiguous_format
KERNELS = ("auto", "cuda", "torch")
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_COLUMNS = 16384  # of a row that the CUDA kernel norms: shared memory holds the weight's gradient
MOST_HEAD_BYTES = 1024  # a warp has a head, each lane 16 bytes of both halves
PACKET = 16  # bytes that the CUDA kernels read at once
# "auto" takes the CUDA kernels only once tests/gpu/test_gpu_pointwise.py passed on a GPU; until then they have to be
# asked for.
CUDA_PROVEN = False
COMPILED = not MISSING and torch._C._dispatch_has_kernel_for_dispatch_key("dflash_scale::rms_norm", "CUDA")
# Numbers of a tensor that plain torch works on, in fp32, at once: what a cache holds, what a launch is worth.
SLICE_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 23}


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, kernel: str = "auto") -> Tensor:
    """x (N, H), weight (H,) -> (N, H) in the dtype of x. Keeps x, weight and one statistic a row.

    kernel, here and below: "cuda", "torch" (any device and floating dtype), or "auto". Both repeat bit for bit. Raises
    ValueError for a kernel that cannot run these tensors: only "auto" ever takes another one.
    """
    return cast(Tensor, _RmsNorm.apply(x, weight, eps, choose(kernel, "rms_norm", (x, weight))))


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *, kernel: str = "auto") -> Tensor:
    """RMSNorm of each head, then RoPE in the halves convention. Keeps its inputs and one statistic a head.

    x (N, heads, D), weight (D,), cos and sin (N, D) without gradient -> (N, heads, D) in the dtype of x.
    """
    chosen = choose(kernel, "norm_rope", (x, weight, cos, sin))
    return cast(Tensor, _NormRope.apply(x, weight, eps, cos, sin, chosen))


def silu_mul(gate: Tensor, up: Tensor, *, kernel: str = "auto") -> Tensor:
    """gate and up (N, I) of one dtype -> (N, I). Keeps gate and up."""
    return cast(Tensor, _SiluMul.apply(gate, up, choose(kernel, "silu_mul", (gate, up))))


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


def choose(kernel: str, operator: str, tensors: tuple[Tensor, ...]) -> str:
    """The kernel that runs, never "auto"."""
    if kernel == "auto":
        if tensors[0].device.type != "cuda":
            return "torch"
        reason = obstacle("cuda", operator, tensors)
        if reason is None and not CUDA_PROVEN:
            reason = "has not been proven on a GPU yet"
        _log_choice(operator, reason)
        return "cuda" if reason is None else "torch"
    reason = obstacle(kernel, operator, tensors)
    if reason is not None:
        raise ValueError(f'drafter.pointwise: got "{kernel}", which {reason}; use "auto" or "torch"')
    return kernel


def obstacle(kernel: str, operator: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why a kernel cannot run an operator on these tensors, as the rest of a sentence; None if it can."""
    if kernel not in KERNELS:
        return f"is none of {', '.join(KERNELS)}"
    if kernel == "torch":
        return None
    x = tensors[0]
    size, packet = x.shape[-1] * x.element_size(), PACKET * (2 if operator == "norm_rope" else 1)
    if x.device.type != "cuda":
        return f"does not run on {x.device}"
    if not COMPILED:
        return f"needs the compiled operators, but {MISSING or f'{LIBRARY.name} was built without nvcc'}"
    if x.dtype not in CUDA_DTYPES or any(tensor.dtype != x.dtype for tensor in tensors):
        found = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        return f"takes float32, bfloat16 or float16, one for all, got {found}"
    if size == 0 or size % packet:
        return f"takes sizes that are multiples of {packet} bytes, got {size}"
    if operator == "norm_rope" and size > MOST_HEAD_BYTES:
        return f"takes heads of up to {MOST_HEAD_BYTES} bytes, got {size}"
    if operator == "rms_norm" and x.shape[-1] > MOST_COLUMNS:
        return f"takes a norm of up to {MOST_COLUMNS} numbers, got {x.shape[-1]}"
    return None


@functools.cache
def _log_choice(operator: str, reason: str | None) -> None:
    chosen, why = ("cuda", "") if reason is None else ("torch", f': "cuda" {reason}')
    log.info('%s on cuda runs kernel "%s"%s', operator, chosen, why)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernel: str) -> Tensor:
        run = _rms_norm_cuda if kernel == "cuda" else _rms_norm_torch
        out, scales = run(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        ctx.run = _rms_norm_backward_cuda if kernel == "cuda" else _rms_norm_backward_torch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.run(dout, *ctx.saved_tensors), None, None)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, kernel: str) -> Tensor:
        run = _norm_rope_cuda if kernel == "cuda" else _norm_rope_torch
        out, scales = run(x, weight, eps, cos, sin)
        ctx.save_for_backward(x, weight, scales, cos, sin)
        ctx.run = _norm_rope_backward_cuda if kernel == "cuda" else _norm_rope_backward_torch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.run(dout, *ctx.saved_tensors), None, None, None, None)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.run = _silu_mul_backward_cuda if kernel == "cuda" else _silu_mul_backward_torch
        return _silu_mul_cuda(gate, up) if kernel == "cuda" else _silu_mul_torch(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.run(dout, *ctx.saved_tensors), None)


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


def _rows(x: Tensor) -> Tensor:
    """x, or a copy of it, so that rows have no gaps and start at multiples of 16 bytes."""
    whole = not len(x) or x[0].is_contiguous()
    return x if whole and x.stride(0) * x.element_size() % PACKET == 0 and _aligned(x) else x.clone(memory_format=DENSE)


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() and _aligned(x) else x.clone(memory_format=DENSE)


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % PACKET == 0


def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ops.dflash_scale.rms_norm(_rows(x), _dense(weight), eps)


def _rms_norm_backward_cuda(dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dflash_scale.rms_norm_backward(_dense(dout), _rows(x), _dense(weight), scales)


def _norm_rope_cuda(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dflash_scale.norm_rope(_rows(x), _dense(weight), _dense(cos), _dense(sin), eps)


def _norm_rope_backward_cuda(
    dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    rope = (_dense(cos), _dense(sin))
    return torch.ops.dflash_scale.norm_rope_backward(_dense(dout), _rows(x), _dense(weight), scales, *rope)


def _silu_mul_cuda(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.dflash_scale.silu_mul(_rows(gate), _rows(up))


def _silu_mul_backward_cuda(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dflash_scale.silu_mul_backward(_dense(dout), _rows(gate), _rows(up))
