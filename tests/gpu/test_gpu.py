"""The attention on a GPU: the checks of check.py, and properties over random problems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from dflash_scale.ops.attention import ATTENTION, anchor_attention
from dflash_scale.ops.library import MISSING
from tests.gpu import check
from tests.support.attention_cases import Case, case, cases


def backends() -> list[str]:
    some = case(head_dim=128, dtype=torch.bfloat16)
    return [row.name for row in ATTENTION.backends if row.device == "cuda" and check.runs(some, row.name, "cuda")]


def test_the_compiled_kernels_are_there() -> None:
    assert MISSING is None, MISSING
    major, minor = torch.cuda.get_device_capability()
    wanted = {(8, 0): {"sm80"}, (9, 0): {"sm80", "sm90"}}.get((major, minor), set())
    assert wanted <= set(backends()), f"compute capability {major}.{minor} runs only {backends()}"


def test_plan() -> None:
    check.check_plan("plan", "cuda")


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", check.CHECKS)
def test_check(name: str, backend: str) -> None:
    check.CHECKS[name](backend, "cuda")


@pytest.mark.parametrize("backend", backends())
@settings(max_examples=60, deadline=None)
@given(some=cases())
def test_equals_the_definition(backend: str, some: Case) -> None:
    """Where a backend refuses the problem, the refusal names one that takes it."""
    some = Case(**{**some.__dict__, "density": min(some.density, 0.05)})
    if check.runs(some, backend, "cuda"):
        check.compare_with_definition(some, backend, "cuda")
        return
    plan = some.plan("cuda")
    with pytest.raises(ValueError, match=f'attention_backend: got "{backend}", which .*; use "'):
        anchor_attention(*some.tensors(plan), plan, backend=backend)


def test_auto_on_a_gpu() -> None:
    some = case(head_dim=128, dtype=torch.bfloat16)
    check.compare_with_definition(some, "auto", "cuda")
