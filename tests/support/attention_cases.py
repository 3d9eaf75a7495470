"""Attention problems that several test files solve, and how their results are compared. Needs torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops.attention import anchor_attention
from dflash_scale.ops.attention_plan import Plan, build_plan

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
NAMES = ("out", "dq", "dk_ctx", "dv_ctx", "dk_blk", "dv_blk")


@dataclass(frozen=True)
class Case:
    """One attention problem; `lengths` are the documents' tokens, padding follows them."""

    lengths: tuple[int, ...]
    padding: int
    density: float
    block_size: int
    key_heads: int
    group: int
    head_dim: int
    window: int | None
    causal_block: bool
    dtype: torch.dtype
    seed: int

    def plan(self, device: str = "cpu") -> Plan:
        generator = torch.Generator().manual_seed(self.seed)
        doc_ids = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        tokens = doc_ids.numel()
        doc_ids = torch.cat([doc_ids, torch.full((self.padding,), -1)]).int()
        anchors = torch.nonzero(torch.rand(tokens, generator=generator) < self.density).flatten().int()
        return build_plan(
            anchors.to(device),
            doc_ids.to(device),
            block_size=self.block_size,
            window=self.window,
            causal_block=self.causal_block,
            group=self.group,
        )

    def tensors(self, plan: Plan) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        slots, tokens = plan.anchors.numel() * self.block_size, plan.doc_ids.numel()
        heads = self.key_heads * self.group
        shapes = [(slots, heads), (tokens, self.key_heads), (tokens, self.key_heads)] + [(slots, self.key_heads)] * 2
        return [
            torch.randn(*shape, self.head_dim, generator=generator, dtype=torch.float64)
            .to(self.dtype)
            .to(plan.anchors.device)
            for shape in shapes
        ]


def case(**changes: object) -> Case:
    values: dict = dict(
        lengths=(150, 3, 1, 90), padding=20, density=0.2, block_size=4, key_heads=2, group=2, head_dim=16,
        window=None, causal_block=False, dtype=torch.float32, seed=0,
    )  # fmt: skip
    return Case(**(values | changes))


def outputs(case: Case, backend: str, device: str = "cpu", compute: torch.dtype | None = None) -> list[Tensor]:
    """The output and the five gradients, of inputs rounded to the case's dtype and then computed in `compute`."""
    plan = case.plan(device)
    tensors = [tensor.to(compute or case.dtype).requires_grad_() for tensor in case.tensors(plan)]
    out = anchor_attention(*tensors, plan, backend=backend)
    generator = torch.Generator().manual_seed(case.seed + 2)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    out.backward(dout.to(out))
    grads = [tensor.grad for tensor in tensors]
    assert all(grad is not None and grad.dtype == out.dtype for grad in grads)
    return [out.detach(), *[grad for grad in grads if grad is not None]]


def assert_close(case: Case, got: list[Tensor], wanted: list[Tensor]) -> None:
    for name, x, y in zip(NAMES, got, wanted, strict=True):
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)} instead of {tuple(y.shape)} for {case}"
        if x.numel() == 0:
            continue
        error = (x.double() - y.double()).abs().max().item() / max(1.0, y.double().abs().max().item())
        assert error <= TOLERANCE[case.dtype], f"{name} {tuple(x.shape)} is off by {error:.2e} for {case}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        lengths=tuple(draw(st.lists(st.sampled_from([1, 2, 7, 40, 128, 200, 300]), min_size=1, max_size=5))),
        padding=draw(st.sampled_from([0, 1, 130])),
        density=draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        block_size=draw(st.sampled_from([1, 2, 5, 8, 16, 70])),
        key_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3, 5, 8])),
        head_dim=draw(st.sampled_from([1, 8, 20, 64])),
        window=draw(st.sampled_from([None, 1, 2, 6, 64, 1000])),
        causal_block=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        seed=draw(st.integers(0, 1000)),
    )
