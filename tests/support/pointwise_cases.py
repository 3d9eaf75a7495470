"""Cases of norms, rotary embedding and SiLU, for the emulated GPU and a real one."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops import pointwise
from dflash_scale.ops.pointwise import (
    POINTWISE,
    norm_rope,
    norm_rope_definition,
    rms_norm,
    rms_norm_definition,
    silu_mul,
    silu_mul_definition,
)
from tests.support.emulated import Guarded, build

OPERATORS = ("rms_norm", "norm_rope", "silu_mul")
HALVES = (torch.bfloat16, torch.float16)
NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPS = 1e-6
# A result's last rounding, as a share of it, and what the arithmetic before it loses, as a share of the largest term.
ROUNDING = {torch.float64: 1e-14, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ARITHMETIC = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
SUBNORMAL = 2.0**-24  # what float16 has below its normal numbers


@dataclass(frozen=True)
class Case:
    """kind: how large x is; view: what all tensors are views of; slices: numbers that plain torch works on at once;
    blocks: thread blocks of a norm's backward, at most."""

    operator: str
    rows: int = 5
    heads: int = 3
    size: int = 16
    kind: str = "random"
    view: str = "whole"
    dtype: torch.dtype = torch.float32
    slices: int = 1 << 18
    blocks: int = 512
    seed: int = 0

    def tensors(self, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What is differentiated by, the rest (cos and sin), and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
            return viewed(numbers.to(device, self.dtype), self.view)

        shape = (self.rows, self.heads, self.size) if self.operator == "norm_rope" else (self.rows, self.size)
        x = draw(*shape, scale={"random": 1.0, "tiny": 1e-4, "large": 30.0, "zeros": 0.0}[self.kind])
        if self.operator == "silu_mul":
            return [x, draw(*shape)], [], draw(*shape)
        rope = [draw(self.rows, self.size, scale=0.3) for _ in range(2)] if self.operator == "norm_rope" else []
        return [x, draw(self.size, shift=1.0)], rope, draw(*shape)


def viewed(x: Tensor, view: str) -> Tensor:
    """x as a part of a larger tensor, the rest of which is NaN. A "shifted" one starts at no multiple of 16 bytes."""
    if view == "whole":
        return x
    if view == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "shifted":
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
    inner = min(1, x.dim() - 1)
    wide = x.new_full((*x.shape[:inner], x.shape[inner] + 16, *x.shape[inner + 1 :]), torch.nan)
    return wide.narrow(inner, 8, x.shape[inner]).copy_(x)


class Norm(ctypes.Structure):
    """`Norm` of csrc/pointwise/pointwise.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "size", "stride")),
        *(("number", ctypes.c_int32), ("eps", ctypes.c_float), ("rotated", ctypes.c_bool)),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "cos", "sin", "scales", "out", "dout", "dx", "dweight")),
        *(("blocks", ctypes.c_int64), ("partials", ctypes.c_void_p)),
    )


class SiluMul(ctypes.Structure):
    """`SiluMul` of csrc/pointwise/pointwise.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "gate_stride", "up_stride")),
        ("number", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "out", "dout", "dgate", "dup")),
    )


class Emulator:
    """The operators on the emulated GPU, as csrc/pointwise/bindings.cpp has them on a real one."""

    def __init__(self) -> None:
        self.kernels = ctypes.CDLL(str(build("pointwise.so", "-O2", source="pointwise.cpp")))
        self.kernels.norm_blocks.restype = ctypes.c_int64
        for name in ("norm", "norm_backward", "silu_mul", "silu_mul_backward"):
            getattr(self.kernels, name).restype = ctypes.c_char_p
        self.case = Case("rms_norm")
        self.library = torch.library.Library("dflash_scale", "IMPL")
        for name in OPERATORS:
            self.library.impl(name, getattr(self, name), "CPU")
            self.library.impl(f"{name}_backward", getattr(self, f"{name}_backward"), "CPU")

    def run(self, name: str, arguments: ctypes.Structure, results: dict[str, Guarded]) -> list[Tensor]:
        for field, buffer in results.items():
            setattr(arguments, field, buffer.tensor.data_ptr())
        failure = getattr(self.kernels, name)(ctypes.byref(arguments), ctypes.c_uint(self.case.seed & 0xFFFFFFFF))
        assert failure is None, f"{failure.decode()} in {name} of {self.case}"
        assert all(buffer.intact() for buffer in results.values()), f"wrote past a buffer in {name} of {self.case}"
        return [buffer.tensor.clone() for buffer in results.values()]

    def norm(self, x: Tensor, weight: Tensor, *rope: Tensor) -> Norm:
        assert in_packets(x) and all(dense(tensor, x) for tensor in (weight, *rope))
        heads = x.shape[1] if rope else 1
        at = [tensor.data_ptr() for tensor in (x, weight, *rope)]
        return Norm(len(x), heads, x.shape[-1], x.stride(0), NUMBER[x.dtype], EPS, bool(rope), *at)

    def norm_forward(self, arguments: Norm, x: Tensor) -> tuple[Tensor, ...]:
        results = {
            "out": Guarded.poisoned(tuple(x.shape), x.dtype),
            "scales": Guarded.poisoned(tuple(x.shape[:-1]), torch.float32),
        }
        return tuple(self.run("norm", arguments, results))

    def norm_backward(self, arguments: Norm, dout: Tensor, x: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        assert dense(dout, x) and scales.dtype == torch.float32
        arguments.dout, arguments.scales = dout.data_ptr(), scales.data_ptr()
        arguments.blocks = min(self.case.blocks, self.kernels.norm_blocks(ctypes.byref(arguments)))
        results = {
            "dx": Guarded.poisoned(tuple(x.shape), x.dtype),
            "dweight": Guarded.poisoned((x.shape[-1],), x.dtype),
            "partials": Guarded.poisoned((arguments.blocks, x.shape[-1]), torch.float32),
        }
        return tuple(self.run("norm_backward", arguments, results)[:2])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return self.norm_forward(self.norm(x, weight), x)

    def rms_norm_backward(self, dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        return self.norm_backward(self.norm(x, weight), dout, x, scales)

    def norm_rope(self, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, ...]:
        return self.norm_forward(self.norm(x, weight, cos, sin), x)

    def norm_rope_backward(self, dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor, *rope: Tensor) -> object:
        return self.norm_backward(self.norm(x, weight, *rope), dout, x, scales)

    def silu(self, gate: Tensor, up: Tensor) -> SiluMul:
        assert in_packets(gate) and in_packets(up) and gate.dtype == up.dtype
        strides, at = (gate.stride(0), up.stride(0)), (gate.data_ptr(), up.data_ptr())
        return SiluMul(*gate.shape, *strides, NUMBER[gate.dtype], *at)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        results = {"out": Guarded.poisoned(tuple(gate.shape), gate.dtype)}
        return self.run("silu_mul", self.silu(gate, up), results)[0]

    def silu_mul_backward(self, dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        assert dense(dout, gate)
        arguments = self.silu(gate, up)
        arguments.dout = dout.data_ptr()
        results = {name: Guarded.poisoned(tuple(gate.shape), gate.dtype) for name in ("dgate", "dup")}
        return tuple(self.run("silu_mul_backward", arguments, results))


@functools.cache
def emulator() -> Emulator:
    return Emulator()


def in_packets(x: Tensor) -> bool:
    whole = not len(x) or x[0].is_contiguous()
    return whole and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def dense(x: Tensor, like: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and x.dtype == like.dtype


def definition(case: Case, leaves: list[Tensor], rest: list[Tensor]) -> Tensor:
    if case.operator == "silu_mul":
        return silu_mul_definition(*leaves)
    wanted = {"rms_norm": rms_norm_definition, "norm_rope": norm_rope_definition}[case.operator]
    return wanted(*leaves, EPS, *rest)


def implementation(kernel: str, case: Case, leaves: list[Tensor], rest: list[Tensor]) -> Tensor:
    if kernel == "emulated":
        emulator().case = case
        anywhere = replace(POINTWISE.backend("cuda"), device=None, limits=None)
        with patch.object(pointwise, "POINTWISE", replace(POINTWISE, backends=(anywhere,))):
            return implementation("cuda", case, leaves, rest)
    if case.operator == "silu_mul":
        return silu_mul(*leaves, kernel=kernel)
    return {"rms_norm": rms_norm, "norm_rope": norm_rope}[case.operator](*leaves, EPS, *rest, kernel=kernel)


def reference(case: Case) -> list[Tensor]:
    """The output and both gradients, in float64."""
    tensors, rest, dout = case.tensors()
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    out = definition(case, leaves, [tensor.double() for tensor in rest])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def run(kernel: str, case: Case) -> list[Tensor]:
    tensors, rest, dout = case.tensors("cuda" if kernel == "cuda" else "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with patch.dict(pointwise.SLICE_NUMBERS, cpu=case.slices):
        out = implementation(kernel, case, leaves, rest)
        return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, dout))]


def largest_terms(case: Case) -> list[Tensor]:
    """How large the terms are whose sums and differences the output and the gradients are, at most."""
    tensors, rope, dout = case.tensors()
    first, second, dout = tensors[0].double().abs(), tensors[1].double().abs(), dout.double().abs()
    if case.operator == "silu_mul":
        return [first * second, dout * second * (1 + first), dout * first]
    scale = (first.square().mean(-1, keepdim=True) + EPS).rsqrt()
    turn = sum(part.double().abs().amax() for part in rope) if rope and case.rows else 1.0
    unit, most = first * scale, dout.amax(-1, keepdim=True) * turn
    dweight = (most * unit.amax(-1, keepdim=True)).sum() if dout.numel() else torch.zeros(())
    return [(unit * second).amax(-1, keepdim=True) * turn, most * second.amax() * scale, dweight]


def check(kernel: str, case: Case) -> None:
    results = zip(("out", "first", "second"), run(kernel, case), reference(case), largest_terms(case), strict=True)
    for name, got, wanted, terms in results:
        assert got.dtype == case.dtype and got.shape == wanted.shape, f"{name} of {kernel} {case}"
        allowed = ROUNDING[case.dtype] * wanted.abs() + ARITHMETIC[case.dtype] * terms
        allowed = allowed + (SUBNORMAL if case.dtype == torch.float16 else 1e-300)
        error = (got.double() - wanted).abs()
        worst = (error / allowed).nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0
        assert worst <= 1, f"{name} of {kernel} is off by {worst:.1f} times what is allowed in {case}"


def draw_case(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], packets: bool) -> Case:
    """With `packets` of a size that the CUDA kernels take."""
    operator, dtype = draw(st.sampled_from(OPERATORS)), draw(st.sampled_from(dtypes))
    unit = (16 // dtype.itemsize if packets else 1) * (2 if operator == "norm_rope" else 1)
    most = {"rms_norm": 300, "norm_rope": 32, "silu_mul": 40}[operator] if packets else 40
    return Case(
        operator=operator,
        rows=draw(st.integers(0, 9)),
        heads=draw(st.integers(1, 5)),
        size=unit * draw(st.integers(1, most)),
        kind=draw(st.sampled_from(["random", "tiny", "large", "zeros"])),
        view=draw(st.sampled_from(["whole", "part", "transposed", "shifted"])),
        dtype=dtype,
        slices=draw(st.sampled_from([1, 100, 1 << 18])),
        blocks=draw(st.sampled_from([1, 2, 3, 512])),
        seed=draw(st.integers(0, 2**31)),
    )


gpu_cases = st.composite(draw_case)((torch.float32, *HALVES), True)
