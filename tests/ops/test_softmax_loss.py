"""The loss of rows of logits: each implementation, and the GPU kernel's source on the emulated GPU, in float64's light.

On a machine with a GPU the compiled CUDA kernel runs the same cases; what it needs to be called proven.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops import softmax_loss
from dflash_scale.ops.softmax_loss import (
    CE,
    COMPILED_TERMS,
    LOSS,
    TERMS,
    Rows,
    Term,
    empty_logits,
    softmax_loss_,
    term_weights,
    wants_verifier,
)
from dflash_scale.training.loss import term_values
from tests.ops.test_gpu_emulated import ROOT, Guarded, build

HALVES = (torch.bfloat16, torch.float16)
ONLY_CE = term_weights({"ce": 1.0})
WITHOUT_TV = term_weights({"ce": 1.0, "kl": 0.5, "reverse_kl": 0.3})
ALL = term_weights({"ce": 0.5, "kl": 0.4, "reverse_kl": 0.3, "tv": 0.2})
TV = [term.name for term in TERMS].index("tv")
NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


class Arguments(ctypes.Structure):
    """`SoftmaxLoss` of csrc/loss/softmax.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "stride", "verifier_stride")),
        ("number", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("logits", "labels", "verifier", "verifier_rows")),
        ("weights", ctypes.c_float * COMPILED_TERMS),
        *((name, ctypes.c_void_p) for name in ("values", "ranks")),
    )


@functools.cache
def emulated_kernel() -> ctypes._CFuncPtr:
    entry = ctypes.CDLL(str(build("loss.so", "-O2", source="loss.cpp"))).softmax_loss
    entry.restype, entry.argtypes = ctypes.c_char_p, (ctypes.POINTER(Arguments), ctypes.c_uint)
    return entry


@dataclass(frozen=True)
class Case:
    """kind: how the logits look, "far" is near each other and far from 0."""

    rows: int = 3
    others: int = 2
    vocabulary: int = 37
    weights: tuple[float, ...] = ONLY_CE
    kind: str = "random"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logits (n, V), labels (n,), the verifier's logits (U, V), rows (n,)."""
        torch.manual_seed(self.seed)
        scale = {"random": 3.0, "equal": 0.0, "huge": 1e4, "far": 3.0, "masked": 2.0}[self.kind]
        shift = 1e4 if self.kind == "far" else 1.0
        z, u = (
            torch.randn(n, self.vocabulary, dtype=torch.float64) * scale + torch.randn(n, 1) * shift
            for n in (self.rows, self.others)
        )
        labels = torch.randint(0, self.vocabulary, (self.rows,)).int()
        if self.kind == "masked":  # the same columns in both, never all, and sometimes a whole row but one
            hidden = torch.rand(self.vocabulary) < torch.rand(())
            hidden[torch.randint(0, self.vocabulary, ())] = False
            z[:, hidden], u[:, hidden] = -torch.inf, -torch.inf
        rows = torch.randint(0, self.others, (self.rows,)).int()
        return z.to(self.dtype), labels, u.to(self.dtype), rows


def reference(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """values, ranks and gradient in float64."""
    z, labels, u, rows = case.tensors()
    z = z.double().requires_grad_()
    values = term_values(z.detach(), labels.long(), u.double()[rows.long()])
    functions = Rows.of(z.log_softmax(1), labels.long(), u.double()[rows.long()])
    # A term without a weight may be infinite, and its gradient then 0 * inf.
    terms = [weight * term.value(functions) for term, weight in zip(TERMS, case.weights, strict=True) if weight]
    if terms:
        torch.stack(terms).sum().backward()
    gradient = torch.zeros_like(z) if z.grad is None else z.grad
    wanted = torch.tensor([bool(weight) or place == CE for place, weight in enumerate(case.weights)])
    order = z.detach().argsort(dim=1, descending=True, stable=True)
    return torch.where(wanted, values, 0), (order == labels[:, None]).int().argmax(1), gradient


def near_ties(case: Case) -> bool:
    """Whether tv's gradient depends on rounding: probabilities that are nearly the same, or the same in rows that are
    not, so that their sums are rounded differently."""
    z, _, u, rows = case.tensors()
    log_p, log_q = z.double().log_softmax(1), u.double()[rows.long()].log_softmax(1)
    shift = z.double() - u.double()[rows.long()]
    alike = ((shift == shift[:, :1]) | shift.isnan()).all(1, keepdim=True)  # -inf less -inf where both are masked
    apart = (log_p - log_q).abs()
    return bool(case.weights[TV] and ((apart < 1e-5 * (1 + log_p.abs())) & ((apart > 0) | ~alike)).any())


def run(kernel: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    z, labels, u, rows = case.tensors()
    if kernel == "emulated":
        return run_emulated(case)
    device = "cuda" if kernel == "cuda" else "cpu"
    logits = empty_logits(*z.shape, z.to(device)).copy_(z)
    soft = (u.to(device), rows.to(device)) if wants_verifier(case.weights) else (None, None)
    values, ranks = softmax_loss_(logits, labels.to(device), case.weights, *soft, kernel=kernel)
    return values.cpu(), ranks.cpu(), logits.cpu()


def run_emulated(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Rows start at multiples of 16 bytes; what lies between them, and around all buffers, has to stay."""
    z, labels, u, rows = case.tensors()
    packet = 16 // z.element_size()
    width = -(-case.vocabulary // packet) * packet
    buffers = [Guarded(torch.full((len(x), width), torch.nan, dtype=x.dtype)) for x in (z, u)]
    for buffer, x in zip(buffers, (z, u), strict=True):
        buffer.tensor[:, : case.vocabulary] = x
    others = [Guarded(labels), Guarded(rows), Guarded.poisoned((case.rows, COMPILED_TERMS), torch.float32)]
    others.append(Guarded(torch.full((case.rows,), -7, dtype=torch.int32)))
    at = [buffer.tensor.data_ptr() for buffer in (*buffers, *others)]
    arguments = Arguments(
        *(case.rows, case.vocabulary, width, width, NUMBER[case.dtype], at[0], at[2]),
        *((at[1], at[3]) if wants_verifier(case.weights) else (None, None)),
        *((ctypes.c_float * COMPILED_TERMS)(*case.weights[:COMPILED_TERMS]), at[4], at[5]),
    )
    failure = emulated_kernel()(ctypes.byref(arguments), case.seed & 0xFFFFFFFF)
    assert failure is None, f"{failure.decode()} in {case}"
    assert all(buffer.intact() for buffer in (*buffers, *others)), f"wrote past a buffer in {case}"
    assert buffers[0].tensor[:, case.vocabulary :].isnan().all(), f"wrote between the rows in {case}"
    return others[2].tensor, others[3].tensor, buffers[0].tensor[:, : case.vocabulary]


def check(kernel: str, case: Case) -> None:
    wanted_values, wanted_ranks, wanted = reference(case)
    values, ranks, gradient = run(kernel, case)
    statistics = 1e-12 if case.dtype == torch.float64 else 2e-5
    text = f"{kernel} {case}"
    wanted_values = wanted_values[:, : values.shape[1]]  # the emulated kernel has the compiled terms alone
    torch.testing.assert_close(values.double(), wanted_values, rtol=statistics, atol=statistics, msg=f"values {text}")
    assert ranks.tolist() == wanted_ranks.tolist(), f"ranks {text}"
    rounding, size = ROUNDING[case.dtype], max(1.0, sum(case.weights))
    # What the terms' factors and log-probabilities lose where logits are huge (1e4 is rounded by 1e-12 in float64), and
    # what fp16 has left below its normal numbers.
    large = case.kind in ("huge", "far")
    floor = size * (
        (2e-11 if large else 1e-12) if case.dtype == torch.float64 else 2e-3 if case.kind == "huge" else 4e-6
    )
    torch.testing.assert_close(gradient.double(), wanted, rtol=rounding, atol=floor, msg=f"gradient {text}")


def draw_case(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], most: int, compiled: bool = True) -> Case:
    return Case(
        rows=draw(st.integers(1, 5)),
        others=draw(st.integers(1, 3)),
        vocabulary=draw(st.integers(1, most)),
        weights=tuple(draw(st.sampled_from([0.0, 0.0, 1.0, 0.3])) * (term.compiled >= compiled) for term in TERMS),
        kind=draw(st.sampled_from(["random", "equal", "huge", "far", "masked"])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**31)),
    )


cpu_cases = st.composite(draw_case)((torch.float32, torch.bfloat16), 300)
torch_cases = st.composite(draw_case)((torch.float64, torch.float32, *HALVES), 300, False)
gpu_cases = st.composite(draw_case)((torch.float32, *HALVES), 2100)


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
