"""RMSNorm, rotary embedding and gated SiLU: plain torch, and the GPU kernels' source on the emulated GPU, in float64's
light.

The emulated kernels stand behind the operators' own names, as kernels of the CPU, so that all of the package's Python
runs too. On a machine with a GPU the compiled kernels run the same cases (tests/gpu/test_gpu_pointwise.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
    rms_norm,
)
from tests.support.pointwise_cases import (
    ARITHMETIC,
    EPS,
    HALVES,
    OPERATORS,
    Case,
    check,
    draw_case,
    gpu_cases,
    implementation,
    largest_terms,
    reference,
    run,
)

torch_cases = st.composite(draw_case)((torch.float64, torch.float32, *HALVES), False)


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
