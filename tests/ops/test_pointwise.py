"""RMSNorm, rotary embedding and gated SiLU: plain torch, and the GPU kernels' source on the emulated GPU, in float64's
light.

The emulated kernels stand behind the operators' own names, as kernels of the CPU, so that all of the package's Python
runs too. On a machine with a GPU the compiled kernels run the same cases (tests/gpu/test_gpu_pointwise.py).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dflash_scale.ops import backends, library, pointwise
from dflash_scale.ops.backends import Proof
from dflash_scale.ops.pointwise import (
    POINTWISE,
    norm_rope,
    norm_rope_definition,
    rms_norm,
    rms_norm_definition,
    silu_mul,
    silu_mul_definition,
)
from tests.ops.test_gpu_emulated import Guarded, build

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


torch_cases = st.composite(draw_case)((torch.float64, torch.float32, *HALVES), False)
gpu_cases = st.composite(draw_case)((torch.float32, *HALVES), True)


@given(torch_cases)
@settings(max_examples=300, deadline=None)
@example(Case("rms_norm", 300, 1, 1024, dtype=torch.bfloat16))
@example(Case("norm_rope", 100, 8, 128, view="part", dtype=torch.bfloat16))
@example(Case("silu_mul", 300, 1, 1024, dtype=torch.bfloat16))
def test_plain_torch(case: Case) -> None:
    check("torch", case)


@given(gpu_cases)
@settings(max_examples=150, deadline=None)
@example(Case("rms_norm", 20, 1, 4096, dtype=torch.bfloat16, blocks=4))
@example(Case("rms_norm", 2, 1, 16384))
@example(Case("norm_rope", 70, 9, 128, dtype=torch.bfloat16, blocks=7))
@example(Case("norm_rope", 9, 5, 96, view="part", dtype=torch.float16, blocks=2))
@example(Case("norm_rope", 9, 3, 256, blocks=3))
@example(Case("silu_mul", 3, 1, 2056, view="part", dtype=torch.bfloat16))
def test_emulated_kernels(case: Case) -> None:
    check("emulated", case)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_the_differences(operator: str) -> None:
    case = Case(operator, 3, 2, 6, dtype=torch.float64, slices=20)
    tensors, rest, _ = case.tensors()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with patch.dict(pointwise.SLICE_NUMBERS, cpu=case.slices):
        assert torch.autograd.gradcheck(lambda *x: implementation("torch", case, list(x), rest), leaves)


@pytest.mark.parametrize("view", ["part", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", ["torch", "emulated"])
def test_backward_keeps_the_inputs_and_a_statistic_of_each_norm(
    kernel: str, operator: str, dtype: torch.dtype, view: str
) -> None:
    case = Case(operator, view=view, dtype=dtype)
    tensors, rest, _ = case.tensors()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        implementation(kernel, case, leaves, rest)
    inputs = {tensor.data_ptr() for tensor in (*leaves, *rest)}
    others = [(tensor.shape, tensor.dtype) for tensor in kept if tensor.data_ptr() not in inputs]
    wanted = {"rms_norm": [((5,), torch.float32)], "norm_rope": [((5, 3), torch.float32)], "silu_mul": []}
    assert len(kept) == len(inputs) + len(others) and others == wanted[operator]


@pytest.mark.parametrize("operator", ["rms_norm", "norm_rope"])
def test_a_weight_of_another_dtype_has_its_gradient_in_that(operator: str) -> None:
    case = Case(operator, 40, 3, 16, dtype=torch.bfloat16)
    (x, weight), rest, dout = case.tensors()
    leaves = [x.requires_grad_(), weight.float().requires_grad_()]
    out = implementation("torch", case, leaves, rest)
    dx, dweight = torch.autograd.grad(out, leaves, dout)
    assert (out.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    terms = largest_terms(case)[2]
    assert (dweight.double() - reference(case)[2]).abs().max() <= ARITHMETIC[torch.float32] * terms


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", ["torch", "emulated"])
def test_nan_stays_in_its_row(kernel: str, operator: str) -> None:
    class Poisoned(Case):
        def tensors(self, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], Tensor]:
            tensors, rest, dout = super().tensors(device)
            tensors[0][1] = torch.nan
            return tensors, rest, dout

    poisoned, clean = run(kernel, Poisoned(operator)), run(kernel, Case(operator))
    for got, wanted in zip(poisoned[:2], clean[:2], strict=True):
        assert got[1].isnan().all() and torch.equal(got[[0, 2, 3, 4]], wanted[[0, 2, 3, 4]])


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_emulated_result_repeats_bit_for_bit(operator: str) -> None:
    class Reordered(Case):
        def tensors(self, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], Tensor]:
            return replace(self, seed=0).tensors(device) if self.seed else super().tensors(device)

    first, second = (run("emulated", Reordered(operator, 60, 4, 64, blocks=5, seed=seed)) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_slices_do_not_change_a_row(operator: str) -> None:
    case = Case(operator, 9, dtype=torch.bfloat16)
    for got, wanted in zip(run("torch", replace(case, slices=50))[:2], run("torch", case)[:2], strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("operator", "size", "reason"),
    [
        ("rms_norm", 20, "multiples of 16 bytes, got 40"),
        ("rms_norm", 16400, "up to 16384 numbers, got 16400"),
        ("norm_rope", 24, "multiples of 32 bytes, got 48"),
        ("norm_rope", 528, "up to 1024 bytes, got 1056"),
        ("silu_mul", 0, "multiples of 16 bytes, got 0"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(operator: str, size: int, reason: str) -> None:
    """By the Python, here of tensors that are on no GPU, and what is no matter of alignment by the launchers too."""
    shape = (1, 1, size) if operator == "norm_rope" else (1, size)
    with on_a_gpu():
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        row = POINTWISE.backend("cuda")
        assert reason in str(row.obstacle((x,), operator))
        assert "got bfloat16, float32" in str(row.obstacle((x, x.float()), operator))
    if size > 20:
        with pytest.raises(AssertionError, match="the launcher returned 1"):
            run("emulated", Case(operator, 1, 1, size, dtype=torch.bfloat16))


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """For the choice: tensors of CUDA without a GPU, compute capability 9.0, a library with CUDA kernels."""
    capability = patch.object(backends, "gpu_capability", lambda _: (9, 0))
    with FakeTensorMode(), capability, patch.dict(library.COMPILED, cuda=True):
        yield


def test_the_choice_is_never_silent() -> None:
    x = torch.zeros(2, 8)
    assert POINTWISE.choose("auto", (x,), "rms_norm").name == "torch"
    with on_a_gpu():
        tensors = (torch.empty(2, 8, device="cuda"),)
        assert POINTWISE.choose("cuda", tensors, "rms_norm").name == "cuda"
        for proof, wanted in ((None, "torch"), (Proof("a report", "a digest"), "cuda")):
            rows = (replace(POINTWISE.backend("cuda"), proof=proof), POINTWISE.backend("torch"))
            assert replace(POINTWISE, backends=rows).choose("auto", tensors, "rms_norm").name == wanted
    with pytest.raises(
        ValueError, match=r'drafter\.pointwise: got "cuda", which needs CUDA tensors, got cpu; use "torch'
    ):
        POINTWISE.choose("cuda", (x,), "rms_norm")
    with pytest.raises(ValueError, match=r'got "cpu", wanted one of auto, cuda, torch'):
        rms_norm(x, x[0], EPS, kernel="cpu")
