"""Cases of the loss operator, for the emulated GPU and a real one."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops.softmax_loss import (
    CE,
    COMPILED_TERMS,
    TERMS,
    Rows,
    empty_logits,
    softmax_loss_,
    term_weights,
    wants_verifier,
)
from dflash_scale.training.loss import term_values
from tests.support.emulated import Guarded, build

HALVES = (torch.bfloat16, torch.float16)
ONLY_CE = term_weights({"ce": 1.0})
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


gpu_cases = st.composite(draw_case)((torch.float32, *HALVES), 2100)
