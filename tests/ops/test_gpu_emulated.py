"""The GPU kernels' source on an emulated GPU (tests/emulator) against the operator's definition in float64.

What this shows: every index, mask, wait and barrier of the kernels, up to the fidelity of the emulated instructions,
each of which is a few lines after the PTX ISA. What it cannot show: speed, and how real hardware orders memory beyond
those rules.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops.attention_plan import Plan, build_plan
from dflash_scale.ops.attention_reference import visible_block, visible_context
from tests.support.emulated import ROOT, Guarded, build

# Largest norm of a row's error, in parts of the row's norm, the tensor's mean norm and 1. Where a gradient cancels, the
# rounding of `out`, which the backward gets, is most of it.
TOLERANCE = {torch.bfloat16: 2.5e-2, torch.float16: 3e-3}
PLAN = ("starts", "ends", "order", "tile_ranges", "tile_order")
GRADIENTS = ("dq", "dk_ctx", "dv_ctx", "dk_blk", "dv_blk")


class Problem(ctypes.Structure):
    """`Problem` of tests/emulator/attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "anchors")),
        *(
            (name, ctypes.c_int32)
            for name in ("block_size", "q_heads", "kv_heads", "head_dim", "window", "causal_block", "fp16", "items")
        ),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in PLAN),
        *((name, ctypes.c_void_p) for name in ("q", "k_ctx", "v_ctx", "k_blk", "v_blk", "dout")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "delta", *GRADIENTS, "taken")),
    )


@functools.cache
def kernels() -> ctypes.CDLL:
    return load(build("attention.so", "-O2"))


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("forward", "backward"):
        entry = getattr(library, name)
        entry.restype, entry.argtypes = ctypes.c_char_p, (ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_uint)
    return library


@dataclass(frozen=True)
class Case:
    """One attention problem; `lengths` are the documents' tokens, padding (NaN in memory) follows them."""

    lengths: tuple[int, ...] = (90, 3, 1, 70)
    padding: int = 9
    anchors: tuple[int, ...] = (0, 13, 89, 91, 93, 94, 150, 163)
    block_size: int = 4
    key_heads: int = 1
    group: int = 2
    head_dim: int = 64
    window: int | None = None
    causal_block: bool = False
    dtype: torch.dtype = torch.float16
    seed: int = 0

    def plan(self) -> Plan:
        doc_ids = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        doc_ids = torch.cat([doc_ids, torch.full((self.padding,), -1)]).int()
        anchors = torch.tensor(self.anchors, dtype=torch.int32)
        return build_plan(
            anchors,
            doc_ids,
            block_size=self.block_size,
            window=self.window,
            causal_block=self.causal_block,
            group=self.group,
        )

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        slots, tokens = len(self.anchors) * self.block_size, sum(self.lengths) + self.padding
        heads = self.key_heads * self.group
        shapes = {"q": (slots, heads), "k_ctx": (tokens, self.key_heads), "v_ctx": (tokens, self.key_heads)}
        shapes |= {"k_blk": (slots, self.key_heads), "v_blk": (slots, self.key_heads), "dout": (slots, heads)}
        return {
            name: torch.randn(*shape, self.head_dim, generator=generator).to(self.dtype)
            for name, shape in shapes.items()
        }


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    """The definition, dense, in float64."""
    plan = case.plan()
    inputs = {name: tensor.double() for name, tensor in case.inputs().items()}
    dout = inputs.pop("dout")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    blocks, size, heads = len(case.anchors), case.block_size, (case.key_heads, case.group)
    q = leaves["q"].view(blocks, size, *heads, -1)
    own_k, own_v = (leaves[name].view(blocks, size, case.key_heads, -1) for name in ("k_blk", "v_blk"))
    scores = torch.cat(
        [torch.einsum("ashgd,thd->ashgt", q, leaves["k_ctx"]), torch.einsum("ashgd,ajhd->ashgj", q, own_k)], -1
    )
    seen = torch.cat([visible_context(plan), visible_block(plan).expand(blocks, -1, -1)], -1)[:, :, None, None, :]
    scores = (scores * case.head_dim**-0.5).masked_fill(~seen, float("-inf"))
    weights, tokens = torch.softmax(scores, -1), leaves["k_ctx"].shape[0]
    out = torch.einsum("ashgt,thd->ashgd", weights[..., :tokens], leaves["v_ctx"])
    out = (out + torch.einsum("ashgj,ajhd->ashgd", weights[..., tokens:], own_v)).reshape(dout.shape)
    out.backward(dout)
    wanted = {"out": out.detach(), "lse": torch.logsumexp(scores, -1).detach().reshape(dout.shape[:2])}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        wanted["d" + name] = leaf.grad
    return wanted


@dataclass
class Run:
    """A case's buffers, and the struct of pointers to them that the kernels get."""

    case: Case
    kernel: int  # 80 or 90
    buffers: dict[str, Guarded]
    problem: Problem

    @classmethod
    def of(cls, case: Case, kernel: int = 80) -> Run:
        inputs, made = case.inputs(), case.plan()
        plan = {name: getattr(made, name) for name in PLAN}
        for name in ("k_ctx", "v_ctx"):
            # Hopper's copies take whole tiles, so there, as in the definition, what nobody sees has to be finite.
            inputs[name][sum(case.lengths) :] = float("nan") if kernel == 80 else 1000.0
        buffers = {name: Guarded(tensor) for name, tensor in (inputs | plan).items()}
        buffers["out"] = Guarded.poisoned(tuple(inputs["q"].shape), case.dtype)
        for name in ("lse", "delta"):
            buffers[name] = Guarded.poisoned(tuple(inputs["q"].shape[:2]), torch.float32)
        for name in GRADIENTS:
            buffers[name] = Guarded.poisoned(tuple(inputs[name[1:]].shape), case.dtype)
        buffers["taken"] = Guarded(torch.tensor([-3], dtype=torch.int32))
        problem = Problem(
            inputs["k_ctx"].shape[0], len(case.anchors), case.block_size, case.key_heads * case.group, case.key_heads,
            case.head_dim, case.window or 0, case.causal_block, case.dtype == torch.float16, plan["order"].numel(),
            case.head_dim**-0.5, **{name: buffer.tensor.data_ptr() for name, buffer in buffers.items()},
        )  # fmt: skip
        return cls(case, kernel, buffers, problem)

    def call(self, entry: str, machine: int, library: ctypes.CDLL | None = None) -> None:
        failure = getattr(library or kernels(), entry)(self.problem, self.kernel, machine)
        assert failure is None, f"{failure.decode()} in {entry} of sm{self.kernel} for {self.case}, machine {machine}"
        for name, buffer in self.buffers.items():
            assert buffer.intact(), f"{entry} wrote past the ends of {name} for {self.case}, machine {machine}"

    def check(self, name: str) -> None:
        got, wanted = self.buffers[name].tensor.double(), expected(self.case)[name]
        assert bool(got.isfinite().all()), f"{name} is not finite for {self.case}"
        if name == "lse":
            error = (got - wanted).abs().max().item()
            assert error < 1e-4, f"lse is off by {error:.2e} for {self.case}"
            return
        if name in ("dk_ctx", "dv_ctx"):
            unseen = ~visible_context(self.case.plan()).any(0).any(0)
            assert bool((got[unseen] == 0).all()), f"{name} of unseen keys is not zero for {self.case}"
        norms = wanted.norm(dim=-1)
        # Gradients may cancel to nothing, as in a row that sees one key; what they are made of is of size 1.
        error = ((got - wanted).norm(dim=-1) / (norms + norms.mean() + 1)).max().item()
        assert error < TOLERANCE[self.case.dtype], f"{name} is off by {error:.2e} for {self.case}"


def check_all(case: Case, machine: int = 0) -> None:
    """Forward and backward of every kernel that takes the case, everything they write."""
    for kernel in (80, 90) if case.head_dim <= 128 else (80,):
        run = Run.of(case, kernel)
        run.call("forward", machine)
        for name in ("out", "lse"):
            run.check(name)
        run.call("backward", machine)
        for name in GRADIENTS:
            run.check(name)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = tuple(draw(st.lists(st.sampled_from([1, 2, 7, 40, 129, 200]), min_size=1, max_size=5)))
    block_size = draw(st.sampled_from([1, 2, 5, 8, 16, 32]))
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]))
    if draw(st.booleans()):
        candidates = range(sum(lengths))
    else:  # all anchors in one document
        document = draw(st.integers(0, len(lengths) - 1))
        candidates = range(sum(lengths[:document]), sum(lengths[: document + 1]))
    most = max(1, 320 // (block_size * group))
    anchors = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=most))
    return Case(
        lengths=lengths,
        padding=draw(st.sampled_from([0, 1, 130])),
        anchors=tuple(sorted(anchors)),
        block_size=block_size,
        key_heads=draw(st.sampled_from([1, 2])),
        group=group,
        head_dim=draw(st.sampled_from([64, 64, 96, 128, 256])),
        window=draw(st.sampled_from([None, 1, 2, 6, 20, 64, 1000])),
        causal_block=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_kernels_equal_definition(case: Case, machine: int) -> None:
    check_all(case, machine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_each_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    check_all(Case(head_dim=head_dim, dtype=dtype, key_heads=2, window=50))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 64])
def test_each_group(group: int) -> None:
    check_all(Case(group=group, anchors=(0, 89, 93, 150), block_size=5))


@pytest.mark.parametrize("block_size", [1, 2, 5, 8, 16, 32, 64])
@pytest.mark.parametrize(("window", "causal_block"), [(None, True), (9, False)])
def test_each_block_size(block_size: int, window: int | None, causal_block: bool) -> None:
    check_all(Case(block_size=block_size, group=1, window=window, causal_block=causal_block))


@pytest.mark.parametrize("window", [1, 2, 7, 64, 10_000, 2**31 - 1])
def test_each_window(window: int) -> None:
    check_all(Case(window=window))


def test_many_key_tiles() -> None:
    """Long enough for interior tiles, for tiles that some rows of a CTA do not see, and for gaps between documents."""
    lengths, anchors = (300, 500, 260), (5, 131, 290, 295, 799, 803, 805, 900, 1058)
    check_all(Case(lengths=lengths, anchors=anchors, block_size=8, group=4))
    check_all(Case(lengths=lengths, anchors=anchors, block_size=8, group=4, head_dim=256, dtype=torch.bfloat16))


def test_one_token_documents() -> None:
    check_all(Case(lengths=(1,) * 140, anchors=tuple(range(0, 140, 3))))


def test_repeated_anchors() -> None:
    """Several blocks may stand at one anchor."""
    check_all(Case(anchors=(60,) * 40, block_size=2))


@pytest.mark.parametrize("kernel", [80, 90])
@pytest.mark.parametrize("highest", [60, 6, 2])
def test_scores_of_any_size(highest: int, kernel: int) -> None:
    """Peaks rise late, in steps that may lag: growing scores, and rows whose first tiles are masked."""
    case = Case(lengths=(400,), padding=0, anchors=(30, 200, 399), block_size=16, window=380)
    run = Run.of(case, kernel)
    growing = torch.linspace(-highest, highest, 400)[:, None, None]
    run.buffers["k_ctx"].tensor[:] = growing * torch.ones(64)
    run.buffers["q"].tensor[:] = 1 / 8
    run.call("forward", 0)
    scores = growing[:, 0, 0].half().double()  # 64 products of 1 / 8, times 1 / sqrt(64)
    own = torch.einsum("abd->ab", run.buffers["k_blk"].tensor.double().view(3, 16, 64)) / 64
    seen, own_seen = visible_context(case.plan()), visible_block(case.plan())
    nothing = torch.tensor(-torch.inf, dtype=torch.float64)
    weights = torch.cat([torch.where(seen, scores, nothing), torch.where(own_seen, own[:, None, :], nothing)], -1)
    got = run.buffers["lse"].tensor.double().view(3, 16, 2)
    assert (got - torch.logsumexp(weights, -1)[:, :, None]).abs().max() < 1e-4
    values, own_values = (
        run.buffers["v_ctx"].tensor.double()[:, 0],
        run.buffers["v_blk"].tensor.double().view(3, 16, 64),
    )
    weights = torch.softmax(weights, -1)
    wanted = weights[..., :400] @ values + weights[..., 400:] @ own_values
    out = run.buffers["out"].tensor.double().view(3, 16, 2, 64)
    assert (out - wanted[:, :, None]).abs().max() < 4e-3


@pytest.mark.parametrize("machine", range(4))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_items(head_dim: int, machine: int) -> None:
    """On Hopper one block of threads takes them all: items of several tiles and of one, and one with half its rows."""
    anchors = (0, *range(5, 300, 40), *range(301, 309))
    case = Case(
        lengths=(300, *([1] * 10)), padding=0, anchors=anchors, block_size=8, group=8, key_heads=2, head_dim=head_dim
    )
    check_all(case, machine)


@pytest.mark.parametrize("kernel", [80, 90])
def test_result_does_not_depend_on_timing(kernel: int) -> None:
    """Bit for bit the same, in whatever order warps run."""
    case = Case(group=4, block_size=8, head_dim=128, key_heads=2)
    results = []
    for machine in range(3):
        run = Run.of(case, kernel)
        run.call("forward", machine)
        run.call("backward", machine)
        results.append({name: run.buffers[name].tensor.clone() for name in ("out", "lse", *GRADIENTS)})
    for other in results[1:]:
        assert all(torch.equal(results[0][name], tensor) for name, tensor in other.items())


def test_offsets_beyond_32_bits() -> None:
    """The last work item of the largest problem, in memory of which only that item's part is ever touched."""
    case = Case(anchors=(0,) * 1023 + (40,), lengths=(50,), padding=0, block_size=64, group=64, head_dim=256)
    slots, heads, width = 65536, 64, 256
    run = Run.of(replace(case, anchors=(0,)))
    last = {name: run.buffers[name].tensor for name in ("q", "k_blk", "v_blk")}
    plan = Run.of(replace(case, anchors=(40,)))
    nbytes = {"q": slots * heads * width * 2, "out": slots * heads * width * 2, "lse": slots * heads * 4}
    nbytes |= {"k_blk": slots * width * 2, "v_blk": slots * width * 2}
    memory = {name: mmap.mmap(-1, size) for name, size in nbytes.items()}
    tensors = {name: torch.frombuffer(block, dtype=torch.uint8) for name, block in memory.items()}
    for name, tensor in last.items():
        tensors[name].view(torch.float16)[-tensor.numel() :] = tensor.flatten()
    for name, tensor in tensors.items():
        setattr(run.problem, name, tensor.data_ptr())
    ends = torch.tensor(case.anchors, dtype=torch.int32)
    starts, order = torch.zeros(1024, dtype=torch.int32), torch.tensor([slots // 2 - 1], dtype=torch.int32)
    run.problem.anchors, run.problem.items = 1024, 1
    run.problem.starts, run.problem.ends, run.problem.order = starts.data_ptr(), ends.data_ptr(), order.data_ptr()
    run.call("forward", 0)
    # The same last block alone: its item 31 holds the same two positions.
    for name, tensor in last.items():
        plan.buffers[name].tensor[:] = tensor
    plan.buffers["k_ctx"].tensor[:] = run.buffers["k_ctx"].tensor
    plan.buffers["v_ctx"].tensor[:] = run.buffers["v_ctx"].tensor
    item = torch.tensor([31], dtype=torch.int32)
    plan.problem.items, plan.problem.order = 1, item.data_ptr()
    plan.call("forward", 0)
    rows = 2 * heads
    assert torch.equal(tensors["lse"].view(torch.float32)[-rows:], plan.buffers["lse"].tensor.flatten()[-rows:])
    tail = slice(-rows * width, None)
    assert torch.equal(tensors["out"].view(torch.float16)[tail], plan.buffers["out"].tensor.flatten()[tail])


@pytest.mark.parametrize("kernel", [80, 90])
@pytest.mark.parametrize("changes", [{"head_dim": 80}, {"q_heads": 130}, {"block_size": 65}, {"scale": -1.0}])
def test_what_the_kernels_refuse(changes: dict[str, float], kernel: int) -> None:
    for entry in ("forward", "backward"):
        run = Run.of(Case(), kernel)
        for name, value in changes.items():
            setattr(run.problem, name, value)
        assert getattr(kernels(), entry)(run.problem, run.kernel, 0) == b"the launcher returned 1"


# --- rows.h, sm80_tile.h and hopper.h by themselves ---
def test_matrix_descriptors() -> None:
    """The bits that CuTe's make_gmma_desc (CUTLASS 4.2) gives for the same tiles: 128-byte swizzle (1) in bits 62-63,
    stride 1024 bytes in 32-45, and in 16-29 the leading offset: unused (1), or one panel of 128 rows (16 KiB)."""
    by_rows, by_depth = kernels().operand, kernels().operand_transposed
    for function in (by_rows, by_depth):
        function.restype, function.argtypes = ctypes.c_uint64, (ctypes.c_uint32, ctypes.c_int, ctypes.c_int)
    base = 0x2000
    rows, depth = 4611686293305360384, 4611686293372403712
    assert by_rows(base, 64, 1) == rows | (base + 32) >> 4
    assert by_rows(base, 64, 5) == rows | (base + 64 * 128 + 32) >> 4
    assert by_depth(base, 128, 2) == depth | (base + 2 * 16 * 128) >> 4


def test_divisor() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2**26, (2000,), generator=generator, dtype=torch.int32)
    for by in range(1, 65):
        near = (torch.tensor([1, 2, 1000, 2**26 // by], dtype=torch.int32) * by)[:, None] + torch.tensor([-1, 0, 1])
        values[:12] = near.flatten().clamp(0, 2**26 - 1).int()
        quotients = torch.empty_like(values)
        kernels().divide(ctypes.c_void_p(values.data_ptr()), values.numel(), by, ctypes.c_void_p(quotients.data_ptr()))
        assert torch.equal(quotients, values // by), by


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_swizzle(head_dim: int) -> None:
    """A permutation of the tile's chunks, in which eight rows' chunks of one column lie in different banks."""
    chunks = head_dim // 8
    places = {(row, chunk): kernels().swizzle(head_dim, row, chunk) for row in range(64) for chunk in range(chunks)}
    assert sorted(places.values()) == list(range(0, 64 * chunks * 16, 16))
    for row in range(0, 64, 8):
        for chunk in range(chunks):
            assert len({places[row + i, chunk] % 128 for i in range(8)}) == 8


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 63, 64])
def test_items_hold_each_row_once(group: int) -> None:
    run = Run.of(Case(group=group, anchors=(0, 89, 93), block_size=7))
    table = torch.empty(run.problem.items * 128, 2, dtype=torch.int32)
    kernels().item_rows(ctypes.byref(run.problem), ctypes.c_void_p(table.data_ptr()))
    rows = [(position, head) for position, head in table.tolist() if position >= 0]
    assert sorted(rows) == [(position, head) for position in range(21) for head in range(group)]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_intervals_are_the_mask(case: Case) -> None:
    run, plan = Run.of(case), case.plan()
    slots = len(case.anchors) * case.block_size
    table = torch.empty(slots, 4, dtype=torch.int32)
    kernels().intervals(ctypes.byref(run.problem), ctypes.c_void_p(table.data_ptr()))
    lo, hi, own_lo, own_hi = table.T[:, :, None]
    positions = torch.arange(plan.doc_ids.numel())
    assert torch.equal((lo <= positions) & (positions < hi), visible_context(plan).flatten(0, 1))
    rows = torch.arange(slots)
    wanted = torch.block_diag(*[visible_block(plan)] * len(case.anchors)).bool()
    assert torch.equal((own_lo <= rows) & (rows < own_hi), wanted)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([16, 32, 64, 128]), st.integers(0, 500), st.integers(1, 128))
def test_key_walk_passes_every_key_once(case: Case, keys: int, position: int, count: int) -> None:
    run, plan = Run.of(case), case.plan()
    slots = len(case.anchors) * case.block_size
    position %= slots
    tiles = torch.empty(4096, 4, dtype=torch.int32)
    found = kernels().key_walk(
        ctypes.byref(run.problem), position, count, keys, ctypes.c_void_p(tiles.data_ptr()), 4096
    )
    first, last = position // case.block_size, min(position + count, slots) - 1
    wanted = visible_context(plan)[first : last // case.block_size + 1].any(0).any(0)
    own = torch.arange(slots)
    wanted_own = (own >= first * case.block_size) & (own < (last // case.block_size + 1) * case.block_size)
    passed, passed_own = torch.zeros(wanted.numel() + keys), torch.zeros(slots + keys)
    for segment, p, lo, hi in tiles[:found].tolist():
        (passed, passed_own)[segment][p : p + keys] += 1
        assert lo <= p < hi
        # Nothing is copied in vain: each tile holds a key that is seen.
        assert (wanted, wanted_own)[segment][p : p + keys].any()
    assert bool((passed <= 1).all()) and bool((passed_own <= 1).all())
    assert bool((passed[: wanted.numel()][wanted] == 1).all()) and bool((passed_own[:slots][wanted_own] == 1).all())


# --- under the sanitizers, in a process of their own ---
def test_sanitized() -> None:
    """No access outside any buffer, shared memory included, and no undefined arithmetic."""
    library = build("attention_sanitized.so", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(library)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "sanitized" in done.stdout, done.stdout + done.stderr[-4000:]


def run_sanitized(path: Path) -> None:
    """What the process does. Guard zones are poisoned, so that reads of them are seen as well."""
    library = load(path)
    for case in (
        Case(group=5, block_size=5, window=20),
        Case(head_dim=96, dtype=torch.bfloat16, anchors=(0, 91, 163)),
        Case(head_dim=128, anchors=(0, 13, 91, 163), causal_block=True),
        Case(head_dim=256, anchors=(13, 163)),
    ):
        for kernel in (80, 90) if case.head_dim <= 128 else (80,):
            run_poisoned(library, Run.of(case, kernel))
    print("sanitized")


def run_poisoned(library: ctypes.CDLL, run: Run) -> None:
    for buffer in run.buffers.values():
        for begin, end in ((0, buffer.begin), (buffer.end, buffer.memory.numel())):
            library.__asan_poison_memory_region(
                ctypes.c_void_p(buffer.memory.data_ptr() + begin), ctypes.c_size_t(end - begin)
            )
    for entry in ("forward", "backward"):
        failure = getattr(library, entry)(run.problem, run.kernel, 0)
        assert failure is None, failure
    for name in ("out", "lse", *GRADIENTS):
        run.check(name)


if __name__ == "__main__":
    run_sanitized(Path(sys.argv[1]))
