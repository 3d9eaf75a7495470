"""The loss kernel on a GPU, against the definition in float64."""

from __future__ import annotations

import torch
from hypothesis import assume, example, given, settings

from tests.support.loss_cases import ALL, Case, check, gpu_cases, near_ties


@given(gpu_cases)
@settings(max_examples=200, deadline=None)
@example(Case(5, 2, 151936, ALL, "random", torch.bfloat16))
@example(Case(5, 2, 262144, ALL, "random", torch.bfloat16))
def test_cuda_kernel(case: Case) -> None:
    assume(not near_ties(case))
    check("cuda", case)
