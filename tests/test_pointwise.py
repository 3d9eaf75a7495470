"""RMSNorm, rotary embedding and gated SiLU: each implementation in the light of the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale import pointwise
from dflash_scale.pointwise import (
    norm_rope,
    norm_rope_definition,
    rms_norm,
    rms_norm_definition,
    silu_mul,
    silu_mul_definition,
)

OPERATORS = ("rms_norm", "norm_rope", "silu_mul")
HALVES = (torch.bfloat16, torch.float16)
EPS = 1e-6
# A result's last rounding, as a share of it, and what the arithmetic before it loses, as a share of the largest term.
ROUNDING = {torch.float64: 1e-14, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ARITHMETIC = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
SUBNORMAL = 2.0**-24  # what float16 has below its normal numbers


@dataclass(frozen=True)
class Case:
    """kind: how large the numbers are; view: what x is a view of; slices: numbers that plain torch works on at once."""

    operator: str
    rows: int = 5
    heads: int = 3
    size: int = 16
    kind: str = "random"
    view: str = "whole"
    dtype: torch.dtype = torch.float32
    slices: int = 1 << 18
    seed: int = 0

    def tensors(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What is differentiated by, the rest (cos and sin), and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = (self.rows, self.heads, self.size) if self.operator == "norm_rope" else (self.rows, self.size)
        scale = {"random": 1.0, "tiny": 1e-4, "large": 30.0, "zeros": 0.0}[self.kind]
        x = viewed(draw(*shape) * scale, self.view, self.dtype)
        if self.operator == "silu_mul":
            return [x, viewed(draw(*shape), self.view, self.dtype)], [], draw(*shape).to(self.dtype)
        weight = (1 + draw(self.size)).to(self.dtype)
        angle = draw(self.rows, self.size) * 3
        rope = [angle.cos().to(self.dtype), angle.sin().to(self.dtype)] if self.operator == "norm_rope" else []
        return [x, weight], rope, draw(*shape).to(self.dtype)


def viewed(x: Tensor, view: str, dtype: torch.dtype) -> Tensor:
    """x as a part of a larger tensor, the rest of which is NaN."""
    if view == "whole":
        return x.to(dtype)
    if view == "transposed":
        return x.to(dtype).transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.full((x.shape[0], x.shape[1] + 16, *x.shape[2:]), torch.nan, dtype=dtype)
    part = wide[:, 8 : 8 + x.shape[1]]
    return part.copy_(x)


def definition(case: Case, leaves: list[Tensor], rest: list[Tensor]) -> Tensor:
    if case.operator == "silu_mul":
        return silu_mul_definition(*leaves)
    wanted = {"rms_norm": rms_norm_definition, "norm_rope": norm_rope_definition}[case.operator]
    return wanted(*leaves, EPS, *rest)


def implementation(case: Case, leaves: list[Tensor], rest: list[Tensor]) -> Tensor:
    if case.operator == "silu_mul":
        return silu_mul(*leaves)
    return {"rms_norm": rms_norm, "norm_rope": norm_rope}[case.operator](*leaves, EPS, *rest)


def reference(case: Case) -> list[Tensor]:
    """The output and both gradients, in float64."""
    tensors, rest, dout = case.tensors()
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    out = definition(case, leaves, [tensor.double() for tensor in rest])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def run(case: Case) -> list[Tensor]:
    tensors, rest, dout = case.tensors()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with patch.dict(pointwise.SLICE_NUMBERS, cpu=case.slices):
        out = implementation(case, leaves, rest)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def largest_terms(case: Case) -> list[Tensor]:
    """How large the terms are whose sums and differences the output and the gradients are, at most."""
    tensors, _, dout = case.tensors()
    first, second, dout = tensors[0].double().abs(), tensors[1].double().abs(), dout.double().abs()
    if case.operator == "silu_mul":
        return [first * second, dout * second * (1 + first), dout * first]
    scale = (first.square().mean(-1, keepdim=True) + EPS).rsqrt()
    unit, most = first * scale, dout.amax(-1, keepdim=True)
    dweight = (most * unit.amax(-1, keepdim=True)).sum() if dout.numel() else torch.zeros(())
    return [(unit * second).amax(-1, keepdim=True), most * second.amax() * scale, dweight]


def check(case: Case) -> None:
    results = zip(("out", "first", "second"), run(case), reference(case), largest_terms(case), strict=True)
    for name, got, wanted, terms in results:
        assert got.dtype == case.dtype and got.shape == wanted.shape, f"{name} is {got.dtype} {got.shape} in {case}"
        allowed = ROUNDING[case.dtype] * wanted.abs() + ARITHMETIC[case.dtype] * terms
        allowed = allowed + (SUBNORMAL if case.dtype == torch.float16 else 1e-300)
        error = (got.double() - wanted).abs()
        worst = (error / allowed).nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0
        assert worst <= 1, f"{name} is off by {worst:.1f} times what is allowed in {case}"


@st.composite
def torch_cases(draw: st.DrawFn) -> Case:
    operator = draw(st.sampled_from(OPERATORS))
    size = draw(st.integers(1, 40))
    return Case(
        operator=operator,
        rows=draw(st.integers(0, 7)),
        heads=draw(st.integers(1, 4)),
        size=size * 2 if operator == "norm_rope" else size,
        kind=draw(st.sampled_from(["random", "tiny", "large", "zeros"])),
        view=draw(st.sampled_from(["whole", "part", "transposed"])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, *HALVES])),
        slices=draw(st.sampled_from([1, 100, 1 << 18])),
        seed=draw(st.integers(0, 2**31)),
    )


@given(torch_cases())
@settings(max_examples=300, deadline=None)
@example(Case("rms_norm", 300, 1, 1024, dtype=torch.bfloat16))
@example(Case("norm_rope", 100, 8, 128, view="part", dtype=torch.bfloat16))
@example(Case("silu_mul", 300, 1, 1024, dtype=torch.bfloat16))
def test_plain_torch(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_the_differences(operator: str) -> None:
    case = Case(operator, 3, 2, 6, dtype=torch.float64, slices=20)
    tensors, rest, _ = case.tensors()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with patch.dict(pointwise.SLICE_NUMBERS, cpu=case.slices):
        assert torch.autograd.gradcheck(lambda *x: implementation(case, list(x), rest), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_keeps_the_inputs_and_a_statistic_of_each_norm(operator: str, dtype: torch.dtype) -> None:
    case = Case(operator, view="part", dtype=dtype)
    tensors, rest, _ = case.tensors()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        implementation(case, leaves, rest)
    inputs = {tensor.data_ptr() for tensor in (*leaves, *rest)}
    others = [(tensor.shape, tensor.dtype) for tensor in kept if tensor.data_ptr() not in inputs]
    statistic = torch.promote_types(dtype, torch.float32)
    wanted = {"rms_norm": [((5,), statistic)], "norm_rope": [((5, 3), statistic)], "silu_mul": []}
    assert len(kept) == len(inputs) + len(others) and others == wanted[operator]


@pytest.mark.parametrize("operator", ["rms_norm", "norm_rope"])
def test_a_weight_of_another_dtype_has_its_gradient_in_that(operator: str) -> None:
    case = Case(operator, 40, 3, 16, dtype=torch.bfloat16)
    (x, weight), rest, dout = case.tensors()
    leaves = [x.requires_grad_(), weight.float().requires_grad_()]
    out = implementation(case, leaves, rest)
    dx, dweight = torch.autograd.grad(out, leaves, dout)
    assert (out.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    terms = largest_terms(case)[2]
    assert (dweight.double() - reference(case)[2]).abs().max() <= ARITHMETIC[torch.float32] * terms


@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_stays_in_its_row(operator: str) -> None:
    case = Case(operator)
    clean = run(case)

    class Poisoned(Case):
        def tensors(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
            tensors, rest, dout = super().tensors()
            tensors[0][1] = torch.nan
            return tensors, rest, dout

    poisoned = run(Poisoned(operator))
    for got, wanted in zip(poisoned[:2], clean[:2], strict=True):
        assert got[1].isnan().all() and torch.equal(got[[0, 2, 3, 4]], wanted[[0, 2, 3, 4]])


def test_slices_do_not_change_a_row() -> None:
    for operator in OPERATORS:
        case = Case(operator, 9, dtype=torch.bfloat16)
        for got, wanted in zip(run(replace(case, slices=50))[:2], run(case)[:2], strict=True):
            assert torch.equal(got, wanted), operator
