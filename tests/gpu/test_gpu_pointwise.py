"""The pointwise kernels on a GPU, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings

from tests.support.pointwise_cases import OPERATORS, Case, check, gpu_cases, run


@given(gpu_cases)
@settings(max_examples=200, deadline=None)
@example(Case("rms_norm", 4096, 1, 4096, dtype=torch.bfloat16))
@example(Case("norm_rope", 4096, 32, 128, view="part", dtype=torch.bfloat16))
@example(Case("silu_mul", 4096, 1, 12288, dtype=torch.bfloat16))
def test_cuda_kernels(case: Case) -> None:
    check("cuda", case)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_result_repeats_bit_for_bit(operator: str) -> None:
    case = Case(operator, 2000, 8, 128, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run("cuda", case), run("cuda", case), strict=True))
