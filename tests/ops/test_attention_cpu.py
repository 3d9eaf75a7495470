"""The CPU operator against the definition in float64, whatever the shape; what memory it takes; which threads work."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops.attention import anchor_attention
from dflash_scale.ops.attention_plan import Plan
from tests.ops.test_attention import NAMES, Case, assert_close, case

ROOT = Path(__file__).resolve().parents[2]
# Scores of the dense definition, over all heads: more would only make the tests slow.
MOST_SCORES = 2_000_000
WIDE = case(density=0.05, group=5, block_size=16, head_dim=128, dtype=torch.bfloat16)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    lengths = tuple(draw(st.lists(st.sampled_from([1, 2, 7, 63, 64, 129, 333]), min_size=1, max_size=5)))
    case = Case(
        lengths=lengths,
        padding=draw(st.sampled_from([0, 1, 130])),
        density=draw(st.sampled_from([1.0, 0.3, 0.05, 0.0])),
        block_size=draw(st.one_of(st.integers(1, 32), st.just(70))),
        key_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 4, 5, 7, 8])),
        head_dim=draw(st.sampled_from([1, 3, 8, 20, 33, 64, 128])),
        window=draw(st.one_of(st.none(), st.integers(1, 12), st.sampled_from([64, 100, 1000]))),
        causal_block=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        seed=draw(st.integers(0, 1000)),
    )
    tokens = sum(lengths)
    per_anchor = case.block_size * case.key_heads * case.group * (tokens + case.padding)
    return replace(case, density=min(case.density, max(3, MOST_SCORES / per_anchor) / tokens))


def run(case: Case, plan: Plan, tensors: list[Tensor], backend: str) -> list[Tensor]:
    """The output and the five gradients; the output's gradient is the same numbers in every dtype."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = anchor_attention(*leaves, plan, backend=backend)
    generator = torch.Generator().manual_seed(case.seed + 2)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


# All anchors in the second of three documents; each as long as a tile of keys; only blocks that do not fit a vector.
@settings(deadline=None)
@given(problems())
@example(replace(WIDE, lengths=(90, 300, 64), density=0.01, seed=15))
@example(replace(WIDE, lengths=(64, 128, 64), padding=0, window=64))
@example(replace(WIDE, block_size=70, group=7, head_dim=33))
def test_operator_equals_the_definition_in_float64(case: Case) -> None:
    plan = case.plan()
    tensors = case.tensors(plan)
    got = run(case, plan, tensors, "cpu")
    assert all(x.dtype == case.dtype for x in got)
    assert_close(case, got, run(case, plan, [tensor.double() for tensor in tensors], "reference"))


LONG = case(lengths=(900,), padding=0, density=0.1, block_size=8, key_heads=1, group=4, head_dim=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_document_repeats_bit_for_bit_whatever_the_threads(dtype: torch.dtype) -> None:
    some = replace(LONG, dtype=dtype)
    plan = some.plan()
    tensors, before, runs = some.tensors(plan), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(run(some, plan, tensors, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for name, x, y in zip(NAMES, runs[0], other, strict=True):
            assert torch.equal(x, y), f"{name} differs between two runs"


# Processes of their own: one that has run nothing else, so that its peak is this operator's.
PRELUDE = """
import contextlib, re, torch
from pathlib import Path
from dflash_scale.ops.attention import anchor_attention
from dflash_scale.ops.attention_plan import build_plan

def problem(tokens, anchors, size, width):
    plan = build_plan(torch.arange(tokens - anchors, tokens, dtype=torch.int32),
                      torch.zeros(tokens, dtype=torch.int32), block_size=size)
    rows = (anchors * size, tokens, tokens, anchors * size, anchors * size)
    return plan, [torch.randn(n, 1, width).to(torch.bfloat16).requires_grad_() for n in rows]

torch.set_num_threads(2)
"""
MEMORY = """
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

plan, tensors = problem(tokens=200_000, anchors=8, size=4, width=64)
held = status("VmRSS")
anchor_attention(*tensors, plan, backend="cpu").sum().backward()
outputs = sum(x.numel() * x.element_size() for x in tensors)
print(status("VmHWM") - held - outputs, outputs)
"""
THREADS = """
def ticks():
    counts = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended since it was listed
            stat = (task / "stat").read_text().rsplit(")", 1)[1].split()
            counts[task] = int(stat[11]) + int(stat[12])
    return counts

plan, tensors = problem(tokens=4000, anchors=64, size=16, width=64)
out = anchor_attention(*tensors, plan, backend="cpu")
before = ticks()
while sum(ticks().values()) - sum(before.values()) < 100:
    torch.autograd.grad(out.sum(), tensors, retain_graph=True)
print(*sorted((count - before.get(task, 0) for task, count in ticks().items()), reverse=True)[:2])
"""


def numbers_from(code: str) -> list[int]:
    # Threads that wait must not look as if they worked.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


def test_extra_memory_does_not_grow_with_the_document() -> None:
    """The document's sums in fp32 would be twice as large as all outputs are; beyond those, only tiles are allowed."""
    extra, outputs = numbers_from(MEMORY)
    assert outputs > 50e6
    assert extra < 8e6, f"forward and backward took {extra / 1e6:.1f} MB beyond {outputs / 1e6:.1f} MB of outputs"


def test_the_backward_of_one_document_and_one_head_uses_two_threads() -> None:
    first, second = numbers_from(THREADS)
    assert second > 0.2 * first, f"of two threads, one worked for {first} ticks and the other for {second}"
