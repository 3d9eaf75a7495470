"""The loss of rows of logits: each implementation, and the GPU kernel's source on the emulated GPU, in float64's light.

On a machine with a GPU the compiled CUDA kernel runs the same cases; what it needs to be called proven.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops import softmax_loss
from dflash_scale.ops.softmax_loss import (
    COMPILED_TERMS,
    LOSS,
    TERMS,
    Term,
    softmax_loss_,
    term_weights,
)
from dflash_scale.training.loss import term_values
from tests.support.emulated import ROOT
from tests.support.loss_cases import (
    ALL,
    HALVES,
    ONLY_CE,
    Case,
    check,
    draw_case,
    gpu_cases,
    near_ties,
    run,
    run_emulated,
)

WITHOUT_TV = term_weights({"ce": 1.0, "kl": 0.5, "reverse_kl": 0.3})
cpu_cases = st.composite(draw_case)((torch.float32, torch.bfloat16), 300)
torch_cases = st.composite(draw_case)((torch.float64, torch.float32, *HALVES), 300, False)


@given(cpu_cases)
@settings(max_examples=300, deadline=None)
@example(Case(2, 1, 262144, ALL))
@example(Case(2, 1, 262144, ONLY_CE, "random", torch.bfloat16))
@example(Case(2, 1, 300, WITHOUT_TV, "far"))
def test_cpu_operator(case: Case) -> None:
    assume(not near_ties(case))
    check("cpu", case)


@given(torch_cases)
@settings(max_examples=200, deadline=None)
@example(Case(2, 1, 262144, ALL, "random", torch.float64))
def test_plain_torch(case: Case) -> None:
    assume(not near_ties(case))
    check("torch", case)


@given(gpu_cases)
@settings(max_examples=120, deadline=None)
@example(Case(1, 1, 9001, ALL))
@example(Case(1, 1, 262144, ALL, "random", torch.bfloat16))
@example(Case(1, 1, 16387, ONLY_CE, "masked", torch.float16))
@example(Case(2, 1, 300, WITHOUT_TV, "far"))
def test_emulated_kernel(case: Case) -> None:
    assume(not near_ties(case))
    check("emulated", case)


@pytest.mark.parametrize("kernel", ["cpu", "torch", "emulated"])
@pytest.mark.parametrize("label", [-1, 37, 2**31 - 1])
def test_a_label_that_is_no_token_makes_its_row_nan_and_touches_no_other(kernel: str, label: int) -> None:
    class Broken(Case):
        def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            z, labels, u, rows = super().tensors()
            labels[1] = label
            return z, labels, u, rows

    values, _, gradient = run(kernel, Broken(weights=ALL))
    wanted_values, _, wanted = run(kernel, Case(weights=ALL))
    assert values[1, 0].isnan() and gradient[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(values[row], wanted_values[row]) and torch.equal(gradient[row], wanted[row])


@pytest.mark.parametrize("kernel", ["cpu", "torch", "emulated"])
@pytest.mark.parametrize(("weight", "wanted"), [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6)])
def test_halves_are_rounded_to_even(kernel: str, weight: float, wanted: float) -> None:
    class Certain(Case):
        def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            z = torch.tensor([[0.0, -torch.inf]]).bfloat16()  # p is 1 and 0, exactly
            return z, torch.tensor([1]).int(), z.clone(), torch.tensor([0]).int()

    _, _, gradient = run(kernel, Certain(1, 1, 2, term_weights({"ce": weight}), "masked", torch.bfloat16))
    assert gradient.tolist() == [[wanted, -wanted]]


@pytest.mark.parametrize("kernel", ["cpu", "torch", "emulated"])
def test_a_nan_among_the_logits_is_not_hidden(kernel: str) -> None:
    class Poisoned(Case):
        def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            z, labels, u, rows = super().tensors()
            z[1, (int(labels[1]) + 1) % self.vocabulary] = torch.nan
            return z, labels, u, rows

    values, _, gradient = run(kernel, Poisoned())
    assert values[1, 0].isnan() and gradient[1].isnan().any() and not gradient[0].isnan().any()


@pytest.mark.parametrize("kernel", ["cpu", "emulated"])
def test_the_result_repeats_bit_for_bit(kernel: str) -> None:
    case = Case(6, 3, 9001 if kernel == "cpu" else 1001, ALL, "random", torch.bfloat16)
    first = run(kernel, case)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:  # the emulated machine takes its turns by the seed
        second = run(kernel, case) if kernel == "cpu" else run_other_order(case)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def run_other_order(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    class Reordered(Case):
        def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return case.tensors()

    return run_emulated(Reordered(**{**vars(case), "seed": case.seed + 1}))


@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_narrower_instruction_sets(limit: str) -> None:
    """Smaller CPUs run other builds of the same source; torch's own variable asks for them here."""
    code = (
        "import torch; from tests.ops.test_softmax_loss import ALL, Case, check;"
        "[check('cpu', Case(3, 2, 301, ALL, kind, dtype, 4)) for kind in ('random', 'huge', 'far', 'masked', 'equal')"
        " for dtype in (torch.float32, torch.bfloat16)]"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": limit, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=300)


def test_operator_contract() -> None:
    z, labels, u, rows = Case(vocabulary=11).tensors()
    operator = torch.ops.dflash_scale.softmax_loss_
    torch.library.opcheck(
        operator, (z, labels, u, rows, list(ALL[:COMPILED_TERMS])), test_utils=("test_schema", "test_faketensor")
    )


def test_the_table_has_the_order_of_the_compiled_kernel() -> None:
    """Each column that the kernel returns is the term at that place, and no other one."""
    assert [term.compiled for term in TERMS] == sorted([term.compiled for term in TERMS], reverse=True)
    z, labels, u, rows = Case(vocabulary=11).tensors()
    wanted = term_values(z.double(), labels.long(), u.double()[rows.long()])
    got, _ = softmax_loss_(z, labels, ALL, u, rows, kernel="cpu")
    for place in range(COMPILED_TERMS):
        alike = [torch.allclose(got[:, place].double(), wanted[:, other], rtol=1e-4) for other in range(len(TERMS))]
        assert alike.index(True) == place and sum(alike) == 1, f"column {place} is not {TERMS[place].name}"


def test_a_term_that_is_not_compiled_runs_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a weight it does not disturb the kernels; with one they refuse, and "auto" takes plain torch."""
    squares = Term("squares", lambda rows: rows.p.square().sum(1), lambda total, *_: total.add_(1.0))
    monkeypatch.setattr(softmax_loss, "TERMS", (*TERMS, squares))
    case = Case(vocabulary=11)
    z, labels, u, rows = case.tensors()
    values, _ = softmax_loss_(z.clone(), labels, (*ALL, 0.0), u, rows, kernel="cpu")
    assert torch.equal(values[:, :-1], run("cpu", replace(case, weights=(*ALL, 0.0)))[0][:, :-1])
    assert values.shape[1] == len(TERMS) + 1 and not values[:, -1].any()
    with pytest.raises(ValueError, match=r'loss\.kernel: got "cpu", which has no squares; use "torch" or "auto"'):
        softmax_loss_(z.clone(), labels, (*ALL, 0.1), u, rows, kernel="cpu")
    values, _ = softmax_loss_(z.clone(), labels, (*ALL, 0.1), u, rows)
    assert torch.allclose(values[:, -1], z.softmax(1).square().sum(1))


def test_the_choice_is_never_silent() -> None:
    z = torch.zeros(1, 4)

    def choose(kernel: str, logits: Tensor) -> str:
        return LOSS.choose(kernel, (logits,), ALL).name

    assert choose("auto", z) == "cpu" and choose("torch", z) == "torch"
    assert choose("auto", z.double()) == "torch" and choose("auto", z.half()) == "torch"
    with pytest.raises(ValueError, match=r'loss\.kernel: got "cuda", which needs CUDA tensors, got cpu; use "cpu" or'):
        choose("cuda", z)
    with pytest.raises(ValueError, match=r'got "cpu", which takes float32 and bfloat16, got float64; use "torch" or'):
        choose("cpu", z.double())
    with pytest.raises(ValueError, match=r'got "sm90", wanted one of auto, cuda, cpu, torch'):
        choose("sm90", z)


def test_without_weights_of_soft_terms_the_verifier_is_not_read() -> None:
    case = replace(Case(), others=1)
    z, labels, _, _ = case.tensors()
    values, _ = softmax_loss_(z, labels, term_weights({"ce": 2.0}))
    assert not values[:, 1:].any() and values[:, 0].all()
