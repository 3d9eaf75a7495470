"""The attention operator against its plain-torch definition, and the definition against a loop over the mask rules."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dflash_scale.ops import attention, attention_plan, attention_reference, backends, library
from dflash_scale.ops.attention import ATTENTION, anchor_attention
from dflash_scale.ops.attention_plan import Plan, build_plan
from dflash_scale.ops.backends import Proof
from tests.support.attention_cases import NAMES, Case, assert_close, case, cases, outputs

ROOT = Path(__file__).resolve().parents[2]


def loop_attention(q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan) -> Tensor:
    """The mask rules, word by word, one query at a time."""
    out = torch.zeros_like(q)
    group, size = q.shape[1] // k_ctx.shape[1], plan.block_size
    for j, anchor in enumerate(plan.anchors.tolist()):
        for slot in range(size):
            for head in range(q.shape[1]):
                row, keys, values = j * size + slot, [], []
                for p in range(plan.doc_ids.numel()):
                    visible = plan.doc_ids[p] == plan.doc_ids[anchor] and p < anchor
                    if plan.window is not None:
                        visible = visible and p > (anchor + slot) - plan.window
                    if visible:
                        keys.append(k_ctx[p, head // group])
                        values.append(v_ctx[p, head // group])
                for other in range(size):
                    if plan.causal_block and other > slot:
                        continue
                    if plan.window is not None and slot - other >= plan.window:
                        continue
                    keys.append(k_blk[j * size + other, head // group])
                    values.append(v_blk[j * size + other, head // group])
                scores = torch.stack(keys) @ q[row, head] / math.sqrt(q.shape[2])
                out[row, head] = torch.softmax(scores, dim=0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("causal_block", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_reference_follows_the_mask_rules(window: int | None, causal_block: bool) -> None:
    small = case(
        lengths=(9, 1, 6), padding=2, density=0.6, group=3, head_dim=3, window=window, causal_block=causal_block,
        dtype=torch.float64,
    )  # fmt: skip
    plan = small.plan()
    tensors = small.tensors(plan)
    got = anchor_attention(*tensors, plan, backend="reference")
    torch.testing.assert_close(got, loop_attention(*tensors, plan), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", [row.name for row in ATTENTION.backends if "cpu" in (row.device, row.also_on)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 6, "causal_block": True}, {"density": 0.0}, {"group": 3, "head_dim": 20, "block_size": 5}],
)
def test_each_backend_equals_the_definition(backend: str, changes: dict[str, Any]) -> None:
    """Of a CPU; those of a GPU in tests/gpu. One without gradients here is held to the definition's forward."""
    some = case(**changes)
    plan, row = some.plan(), ATTENTION.backend(backend)
    tensors = some.tensors(plan)
    if row.obstacle(tuple(tensor.clone().requires_grad_() for tensor in tensors), plan, 1.0) is None:
        assert_close(some, outputs(some, backend), outputs(some, "reference"))
    wanted = anchor_attention(*tensors, plan, backend="reference")
    torch.testing.assert_close(anchor_attention(*tensors, plan, backend=backend), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_match_finite_differences(backend: str) -> None:
    small = case(
        lengths=(7, 1, 5), padding=1, density=0.5, block_size=3, head_dim=2, window=4, causal_block=True,
        dtype=torch.float64,
    )  # fmt: skip
    plan = small.plan()
    tensors = [tensor.requires_grad_() for tensor in small.tensors(plan)]
    assert torch.autograd.gradcheck(lambda *x: anchor_attention(*x, plan, backend=backend, scale=0.7), tensors)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_anchor_gives_empty_output_and_zero_gradients(backend: str) -> None:
    out, dq, dk_ctx, dv_ctx, dk_blk, _ = outputs(case(density=0.0), backend)
    assert out.shape == dq.shape == (0, 4, 16)
    assert dk_blk.shape == (0, 2, 16)
    assert dk_ctx.shape == (264, 2, 16)
    assert not dk_ctx.any()
    assert not dv_ctx.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_context_is_attention_inside_the_block(dtype: torch.dtype) -> None:
    lonely = case(lengths=(1, 1, 1), padding=0, density=1.0, dtype=dtype)
    got = outputs(lonely, "cpu")
    assert_close(lonely, got, outputs(lonely, "reference"))
    assert not got[2].any(), "context that nobody sees has a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit_whatever_the_threads(dtype: torch.dtype) -> None:
    large = case(lengths=(300, 200, 80), density=0.5, dtype=dtype, head_dim=32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(outputs(large, "cpu"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for name, x, y in zip(NAMES, runs[0], run, strict=True):
            assert torch.equal(x, y), f"{name} differs between two runs"


@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_narrower_instruction_sets(limit: str) -> None:
    """The set is chosen once per process, so each one needs a process; torch's own variable limits both."""
    code = (
        "import tests.support.attention_cases as t; cases = [t.case(window=9, dtype=d) for d in t.TOLERANCE];"
        "[t.assert_close(c, t.outputs(c, 'cpu'), t.outputs(c, 'reference')) for c in cases]"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": limit}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=300)


def test_nan_is_not_hidden() -> None:
    plan = case().plan()
    tensors = case().tensors(plan)
    tensors[0][0] = math.nan
    out = anchor_attention(*tensors, plan, backend="cpu")
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


def test_large_scores_do_not_overflow() -> None:
    plan = case().plan()
    tensors = case().tensors(plan)
    got = anchor_attention(*tensors, plan, scale=300.0, backend="cpu")
    torch.testing.assert_close(
        got, anchor_attention(*tensors, plan, scale=300.0, backend="reference"), atol=1e-3, rtol=0
    )


def test_strided_inputs() -> None:
    plan = case().plan()
    tensors = case().tensors(plan)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in tensors]
    out = anchor_attention(*strided, plan)
    assert torch.equal(out, anchor_attention(*tensors, plan))
    out.sum().backward()  # an expanded gradient, with strides of zero


@settings(max_examples=40, deadline=None)
@given(cases())
def test_plan_against_brute_force(case: Case) -> None:
    plan = case.plan()
    seen = attention_reference.visible_context(plan)[:, 0] if plan.block_size else None
    assert seen is not None
    tiles = math.ceil(plan.doc_ids.numel() / attention_plan.TILE)
    assert plan.tile_ranges.shape == (tiles, 2)
    for j in range(plan.anchors.numel()):
        positions = torch.nonzero(seen[j]).flatten().tolist()
        interval = list(range(int(plan.starts[j]), int(plan.ends[j])))
        assert positions == interval, f"block {j} of {case}"
    for t in range(tiles):
        blocks = (
            torch.nonzero(seen[:, t * attention_plan.TILE : (t + 1) * attention_plan.TILE].any(dim=1))
            .flatten()
            .tolist()
        )
        first, last = plan.tile_ranges[t].tolist()
        # Inside a range there may be blocks that see nothing at all, and no other strangers.
        inside = [j for j in range(first, last) if plan.starts[j] < plan.ends[j]]
        assert inside == blocks, f"tile {t} of {case}"
    step, positions = attention_plan.item_positions(case.group), plan.anchors.numel() * case.block_size
    weights = []
    for begin in range(0, positions, step):
        blocks = [position // case.block_size for position in range(begin, min(begin + step, positions))]
        weights.append(math.ceil((int(plan.ends[blocks[-1]]) - int(plan.starts[blocks[0]])) / attention_plan.TILE))
    assert plan.order.tolist() == sorted(range(len(weights)), key=lambda i: -weights[i])
    shares = [(last - first) * 1023 // max(1, plan.anchors.numel()) for first, last in plan.tile_ranges.tolist()]
    assert plan.tile_order.tolist() == sorted(range(tiles), key=lambda t: -shares[t])


@settings(max_examples=20, deadline=None)
@given(cases())
def test_plan_operator_equals_plain_torch(case: Case) -> None:
    plan = case.plan()
    plain = attention_plan._plan_reference(plan.anchors, plan.doc_ids, case.block_size, plan.window or 0, case.group)
    for name, want in zip(("starts", "ends", "tile_ranges", "order", "tile_order"), plain, strict=True):
        got = getattr(plan, name)
        assert got.dtype == torch.int32
        assert torch.equal(got, want), f"{name} for {case}"


def operator_arguments(some: Case, requires_grad: bool) -> tuple:
    plan = some.plan()
    tensors = [tensor.requires_grad_(requires_grad) for tensor in some.tensors(plan)]
    indices = (plan.starts, plan.ends, plan.tile_ranges, plan.order, plan.tile_order)
    return (*tensors, *indices, plan.block_size, plan.window or 0, plan.causal_block, 0.25, 0)


@pytest.mark.parametrize("density", [0.0, 0.2])
def test_opcheck(density: float) -> None:
    some = case(density=density, lengths=(40, 10), window=9)
    plan = some.plan()
    torch.library.opcheck(torch.ops.dflash_scale.build_plan.default, (plan.anchors, plan.doc_ids, 4, 0, 2))
    torch.library.opcheck(torch.ops.dflash_scale.anchor_attention.default, operator_arguments(some, True))
    arguments = operator_arguments(some, False)
    out, lse = torch.ops.dflash_scale.anchor_attention(*arguments)
    backward = (torch.ones_like(out), *arguments[:5], out, lse, *arguments[5:])
    torch.library.opcheck(torch.ops.dflash_scale.anchor_attention_backward.default, backward)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_compiles_without_a_graph_break(backend: str, autocast: bool) -> None:
    some = case()
    plan = some.plan()
    tensors = some.tensors(plan)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*tensors: Tensor) -> Tensor:
        rebuilt = build_plan(plan.anchors, plan.doc_ids, block_size=plan.block_size, group=plan.group)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return anchor_attention(*tensors, rebuilt, backend=backend)

    eager = [tensor.clone().requires_grad_() for tensor in tensors]
    traced = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = anchor_attention(*eager, plan, backend=backend)
    got = step(*traced)
    assert got.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(got, wanted)
    wanted.sum().backward()
    got.sum().backward()
    for x, y in zip(eager, traced, strict=True):
        assert torch.equal(x.grad, y.grad)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("anchors", "doc_ids", "options", "message"),
    [
        (index(1).long(), index(0, 0), {}, "anchors must be (A,) int32"),
        (index(1), index(0, 0)[None], {}, "doc_ids must be (T,) int32"),
        (index(1), index(0, 0), {"block_size": 0}, "block_size must be at least 1"),
        (index(1), index(0, 0), {"window": 0}, "window must be at least 1"),
        (index(1), index(0, 0), {"group": 0}, "group, the query heads per kv head, must be at least 1"),
        (index(2, 1), index(0, 0, 0), {}, "anchors must ascend"),
        (index(3), index(0, 0, 0), {}, "anchors must lie in [0, 3)"),
        (index(-1), index(0, 0, 0), {}, "anchors must lie in [0, 3)"),
        (index(2), index(0, 0, -1), {}, "padding"),
        (index(1), index(0, 1, 0), {}, "one contiguous run"),
        (index(1).to("meta"), index(0, 1), {}, "one device"),
    ],
)
def test_build_plan_refuses(anchors: Tensor, doc_ids: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_plan(anchors, doc_ids, **({"block_size": 4} | options))


def test_attention_refuses_what_does_not_fit() -> None:
    plan = case().plan()
    q, *rest = case().tensors(plan)
    with pytest.raises(ValueError, match="q must be"):
        anchor_attention(q[1:], *rest, plan)
    with pytest.raises(ValueError, match="3 dimensions"):
        anchor_attention(q[0], *rest, plan)
    with pytest.raises(ValueError, match="all five must be alike"):
        anchor_attention(q.double(), *rest, plan)
    with pytest.raises(ValueError, match="no multiple"):
        anchor_attention(q[:, :3], *rest, plan)
    with pytest.raises(ValueError, match="built for 2 query heads per kv head, q and k_ctx have 2 over 2"):
        anchor_attention(q[:, :2].contiguous(), *rest, plan)
    with pytest.raises(ValueError, match="build it where they are"):
        anchor_attention(*[x.to("meta") for x in (q, *rest)], plan)
    for absent in ("cuda", "fast"):
        message = f'drafter.attention_backend: got "{absent}", wanted one of {", ".join(ATTENTION.names)}'
        with pytest.raises(ValueError, match=message):
            anchor_attention(q, *rest, plan, backend=absent)


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("cpu", torch.float16, '"cpu", which takes float32, bfloat16 and float64, got float16; use "flex" or "auto"'),
        ("sm80", torch.bfloat16, '"sm80", which needs CUDA tensors, got cpu; use "cpu" or "auto"'),
        ("sm90", torch.bfloat16, '"sm90", which needs CUDA tensors, got cpu; use "cpu" or "auto"'),
    ],
)
def test_a_named_backend_runs_or_says_why_not(backend: str, dtype: torch.dtype, message: str) -> None:
    some = case(dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(message)):
        anchor_attention(*some.tensors(some.plan()), some.plan(), backend=backend)


def test_flex_without_gradients_on_a_cpu() -> None:
    plan = case().plan()
    tensors = [tensor.requires_grad_() for tensor in case().tensors(plan)]
    with pytest.raises(ValueError, match=re.escape('got "flex", which has no gradients on a CPU; use "cpu" or "auto"')):
        anchor_attention(*tensors, plan, backend="flex")


def test_auto_takes_another_backend_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    some = case(dtype=torch.float16)
    backends._log_choice.cache_clear()
    with caplog.at_level("INFO", logger="dflash_scale.ops.backends"):
        for _ in range(2):
            out = anchor_attention(*some.tensors(some.plan()), some.plan())
    assert out.dtype == torch.float16
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert 'cpu runs backend "reference": "cpu" takes float32' in caplog.text


class OnGpu:
    """A tensor as far as the choice of a backend looks at it."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> None:
        self.device, self.dtype, self.shape, self.requires_grad = torch.device("cuda:0"), dtype, (8, 4, head_dim), True


@pytest.mark.parametrize(
    ("tensor", "capability", "proven", "chosen"),
    [
        (OnGpu(), (9, 0), ("sm90", "sm80"), "sm90"),
        (OnGpu(), (9, 0), ("sm80",), "sm80"),
        (OnGpu(), (8, 0), ("sm90", "sm80"), "sm80"),
        (OnGpu(), (10, 0), ("sm90", "sm80"), "sm80"),
        (OnGpu(), (7, 5), ("sm90", "sm80"), "flex"),
        (OnGpu(), (9, 0), (), "flex"),
        (OnGpu(head_dim=256), (9, 0), ("sm90", "sm80"), "sm80"),
        (OnGpu(head_dim=80), (9, 0), ("sm90", "sm80"), "flex"),
        (OnGpu(torch.float32), (9, 0), ("sm90", "sm80"), "flex"),
        (OnGpu(torch.float64), (9, 0), ("sm90", "sm80"), "reference"),
    ],
)
def test_choice_on_a_gpu(
    tensor: OnGpu, capability: tuple[int, int], proven: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "gpu_capability", lambda _: capability)
    monkeypatch.setitem(library.COMPILED, "cuda", True)
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    proof = Proof("a report", "a digest")
    rows = [replace(row, proof=proof if row.name in proven else None) for row in ATTENTION.backends]
    operator, tensors = replace(ATTENTION, backends=tuple(rows)), (tensor,) * 5
    assert operator.choose("auto", tensors, case().plan(), 0.1).name == chosen
    if chosen.startswith("sm"):
        assert operator.choose("auto", tensors, case().plan(), -0.1).name == "flex"
        with pytest.raises(ValueError, match=re.escape('takes a positive scale, got -0.1; use "flex" or "auto"')):
            operator.choose(chosen, tensors, case().plan(), -0.1)


@pytest.mark.parametrize(
    ("name", "tensor", "capability", "message"),
    [
        ("sm90", OnGpu(), (8, 0), "needs a GPU of compute capability 9.0, got 8.0"),
        ("sm80", OnGpu(), (7, 5), "needs a GPU of compute capability 8.0 or newer, got 7.5"),
        ("sm80", OnGpu(head_dim=80), (9, 0), "takes head dims 64, 96, 128, 256, got 80"),
        ("sm80", OnGpu(torch.float32), (9, 0), "takes bfloat16 and float16, got float32"),
        ("flex", OnGpu(head_dim=512), (9, 0), "takes head dims 16 to 256, got 512"),
        ("cpu", OnGpu(), (9, 0), "needs CPU tensors, got cuda:0"),
    ],
)
def test_a_row_says_what_its_backend_does_not_take(
    name: str, tensor: OnGpu, capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "gpu_capability", lambda _: capability)
    monkeypatch.setitem(library.COMPILED, "cuda", True)
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    assert ATTENTION.backend(name).obstacle((tensor,) * 5, case().plan(), 0.1) == message


def test_autocast_casts_as_torch_does() -> None:
    plan = case(head_dim=32).plan()
    tensors = [tensor.requires_grad_() for tensor in case(head_dim=32).tensors(plan)]
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out = anchor_attention(tensors[0], halves[1], *tensors[2:], plan, backend=backend)
        wanted = anchor_attention(*halves, plan, backend=backend)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, wanted)
        grads = [torch.autograd.grad(x.float().square().sum(), y[0])[0] for x, y in ((out, tensors), (wanted, halves))]
        assert grads[0].dtype == torch.float32
        assert torch.equal(grads[0], grads[1].float())
    with torch.autocast("cpu", torch.bfloat16):
        assert anchor_attention(*[x.detach().double() for x in tensors], plan).dtype == torch.float64


def test_without_the_library_only_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library = outputs(case(), "reference")
    monkeypatch.setattr(library, "MISSING", "_kernels.so has not been built")
    assert_close(case(), outputs(case(), "reference"), with_library)
    plan = case().plan()
    with pytest.raises(ValueError, match=re.escape("pip install -e .")):
        anchor_attention(*case().tensors(plan), plan, backend="cpu")
    plain = anchor_attention(*case().tensors(plan), plan, backend="reference")
    assert torch.equal(anchor_attention(*case().tensors(plan), plan), plain)
