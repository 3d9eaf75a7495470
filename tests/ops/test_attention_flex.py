"""FlexAttention fed by the plan: its numbers against the definition, its block lists against torch's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from dflash_scale.ops import attention, attention_flex, attention_reference
from dflash_scale.ops.attention import ATTENTION, anchor_attention
from dflash_scale.ops.attention_plan import TILE, Plan
from tests.support.attention_cases import Case, assert_close, case, cases, outputs


@pytest.fixture
def gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses gradients on a CPU, where only its plain implementation has them; that one is enough for a test."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    rows = [replace(row, limits=None) if row.name == "flex" else row for row in ATTENTION.backends]
    monkeypatch.setattr(attention, "ATTENTION", replace(ATTENTION, backends=tuple(rows)))


def small(case: Case) -> Case:
    """Keeps dense scores small; flex takes no head dim of its own liking on a CPU."""
    return Case(**{**case.__dict__, "density": min(case.density, 0.1)})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 6, "causal_block": True, "density": 0.5},
        {"window": 1, "group": 3, "head_dim": 20},
        {"block_size": 70, "window": 64, "density": 0.05},
        {"lengths": (1, 1, 128), "padding": 0, "density": 1.0, "dtype": torch.bfloat16},
        {"density": 0.0},
        {"lengths": (300, 200, 80), "dtype": torch.float64, "group": 5, "block_size": 5},
    ],
)
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_flex_equals_reference_with_all_gradients(changes: dict) -> None:
    some = case(**changes)
    assert_close(some, outputs(some, "flex"), outputs(some, "reference"))


def visible(plan: Plan) -> Tensor:
    """The dense mask over the joined keys, (A*S, T padded + A*S) bool, from the definition."""
    anchors, size, tokens = plan.anchors.numel(), plan.block_size, plan.doc_ids.numel()
    context = attention_reference.visible_context(plan).reshape(anchors * size, tokens)
    own = torch.block_diag(*attention_reference.visible_block(plan).expand(anchors, -1, -1)).bool()
    return torch.cat([torch.nn.functional.pad(context, (0, -tokens % TILE)), own], dim=1)


def listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """A block list as (rows, columns) bool."""
    counts, indices = counts[0, 0], indices[0, 0]
    dense = torch.zeros(indices.shape[0], columns, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        chosen = indices[row, :count].long()
        assert chosen.unique().numel() == count
        dense[row, chosen] = True
    return dense


@settings(max_examples=40, deadline=None)
@given(cases())
def test_block_lists_are_those_of_the_dense_mask(some: Case) -> None:
    plan = small(some).plan()
    if plan.anchors.numel() == 0:
        return
    dense, got = visible(plan), attention_flex.block_mask(plan)
    rows, keys = dense.shape
    assert got.seq_lengths == (rows, keys)
    index = torch.arange(rows)[:, None], torch.arange(keys)[None]
    assert torch.equal(got.mask_mod(torch.tensor(0), torch.tensor(0), *index), dense), f"mask of {some}"

    wanted = torch_flex.create_block_mask(lambda b, h, q, k: dense[q, k], 1, 1, rows, keys, device="cpu")
    columns = wanted.kv_indices.shape[-1]
    assert got.kv_indices.shape == wanted.kv_indices.shape
    partial = listed(got.kv_num_blocks, got.kv_indices, columns)
    full = listed(got.full_kv_num_blocks, got.full_kv_indices, columns)
    assert torch.equal(full, listed(wanted.full_kv_num_blocks, wanted.full_kv_indices, columns)), f"full of {some}"
    needed = listed(wanted.kv_num_blocks, wanted.kv_indices, columns)
    assert not (needed & ~partial).any(), f"a tile is missing for {some}"
    if plan.window is None or TILE % plan.block_size == 0:
        assert torch.equal(partial, needed), f"needless tiles for {some}"
    for lists, columnwise in (
        (partial, (got.q_num_blocks, got.q_indices)),
        (full, (got.full_q_num_blocks, got.full_q_indices)),
    ):
        assert torch.equal(listed(*columnwise, lists.shape[0]), lists.T)


def test_the_block_mask_is_made_once_per_plan() -> None:
    plan = case().plan()
    assert attention_flex.block_mask(plan) is attention_flex.block_mask(plan)


def test_flex_compiles_without_a_graph_break() -> None:
    plan = case().plan()
    tensors = case().tensors(plan)
    traced = torch.compile(lambda *x: anchor_attention(*x, plan, backend="flex"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(*tensors), anchor_attention(*tensors, plan, backend="reference"))
