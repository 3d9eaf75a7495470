"""The GPU kernels' source on an emulated GPU (tests/emulator) against the operator's definition in float64.

What this shows: every index, mask, wait and barrier of the kernels, up to the fidelity of the emulated instructions,
each of which is a few lines after the PTX ISA. What it cannot show: speed, and how real hardware orders memory beyond
those rules.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.attention import TILE, Plan, build_plan, visible_block, visible_context

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "emulator"
FLAGS = ("-std=c++20", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DDFLASH_EMULATE")
GUARD = 256  # bytes before and after each buffer that nobody may touch
UNIT_ROWS = 64  # kUnitRows in csrc/attention/rows.h
# Largest error of a row's norm, in parts of that norm and of the tensor's mean norm.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
GRADIENTS = ("dq", "dk_ctx", "dv_ctx", "dk_blk", "dv_blk")


def build(name: str, *flags: str, source: str = "attention.cpp") -> Path:
    """Compiles the emulated kernels unless that is newer than all it was made from."""
    target = BUILD / name
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests" / "emulator").iterdir(), Path(__file__)]
    if not target.is_file() or target.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("no g++ to compile the emulated kernels with")
        BUILD.mkdir(parents=True, exist_ok=True)
        include = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}")
        aside = target.with_suffix(".tmp")
        unit = ROOT / "tests" / "emulator" / source
        subprocess.run([compiler, *FLAGS, *flags, *include, unit, "-o", aside], check=True)
        aside.rename(target)
    return target


class Problem(ctypes.Structure):
    """`Problem` of tests/emulator/attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "anchors")),
        *(
            (name, ctypes.c_int32)
            for name in ("block_size", "q_heads", "kv_heads", "head_dim", "window", "causal_block", "fp16", "items")
        ),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("starts", "ends", "order", "tile_ranges", "tile_order")),
        *((name, ctypes.c_void_p) for name in ("q", "k_ctx", "v_ctx", "k_blk", "v_blk", "dout")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "delta", *GRADIENTS)),
    )


@functools.cache
def kernels() -> ctypes.CDLL:
    return load(build("attention.so", "-O2"))


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("sm80_forward", "sm80_backward"):
        entry = getattr(library, name)
        entry.restype, entry.argtypes = ctypes.c_char_p, (ctypes.POINTER(Problem), ctypes.c_uint)
    return library


class Guarded:
    """A buffer between two guard zones, aligned to 16 bytes; it starts as the tensor's bytes, or as NaN."""

    def __init__(self, tensor: Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        padded = (nbytes + 15) // 16 * 16
        self.memory = torch.full((GUARD + padded + GUARD + 16,), 0xA5, dtype=torch.uint8)
        self.begin = GUARD + -self.memory.data_ptr() % 16
        self.end = self.begin + nbytes
        self.tensor = self.memory[self.begin : self.end].view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor)

    @classmethod
    def poisoned(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Guarded:
        return cls(torch.full(shape, float("nan"), dtype=dtype))

    def intact(self) -> bool:
        return bool((self.memory[: self.begin] == 0xA5).all() and (self.memory[self.end :] == 0xA5).all())


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
            anchors, doc_ids, block_size=self.block_size, window=self.window, causal_block=self.causal_block
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


def gpu_plan(case: Case) -> dict[str, Tensor]:
    """What the kernels take from the plan; any order of items and tiles will do, so it is a random one."""
    plan = case.plan()
    generator = torch.Generator().manual_seed(case.seed)
    positions, per_item = len(case.anchors) * case.block_size, 2 * (UNIT_ROWS // case.group)
    begins = torch.arange(0, plan.doc_ids.numel(), TILE, dtype=torch.int32)
    ends = torch.clamp(begins + TILE, max=plan.doc_ids.numel())
    first = torch.searchsorted(plan.ends, begins, right=True, out_int32=True)
    last = torch.searchsorted(plan.starts, ends, right=False, out_int32=True)
    return {
        "starts": plan.starts,
        "ends": plan.ends,
        "order": torch.randperm(-(-positions // per_item), generator=generator).int(),
        "tile_ranges": torch.stack([first, last], 1),
        "tile_order": torch.randperm(begins.numel(), generator=generator).int(),
    }


@dataclass
class Run:
    """A case's buffers, and the struct of pointers to them that the kernels get."""

    case: Case
    buffers: dict[str, Guarded]
    problem: Problem

    @classmethod
    def of(cls, case: Case) -> Run:
        inputs, plan = case.inputs(), gpu_plan(case)
        for name in ("k_ctx", "v_ctx"):
            inputs[name][sum(case.lengths) :] = float("nan")
        buffers = {name: Guarded(tensor) for name, tensor in (inputs | plan).items()}
        buffers["out"] = Guarded.poisoned(tuple(inputs["q"].shape), case.dtype)
        for name in ("lse", "delta"):
            buffers[name] = Guarded.poisoned(tuple(inputs["q"].shape[:2]), torch.float32)
        for name in GRADIENTS:
            buffers[name] = Guarded.poisoned(tuple(inputs[name[1:]].shape), case.dtype)
        problem = Problem(
            inputs["k_ctx"].shape[0], len(case.anchors), case.block_size, case.key_heads * case.group, case.key_heads,
            case.head_dim, case.window or 0, case.causal_block, case.dtype == torch.float16, plan["order"].numel(),
            case.head_dim**-0.5, **{name: buffer.tensor.data_ptr() for name, buffer in buffers.items()},
        )  # fmt: skip
        return cls(case, buffers, problem)

    def call(self, entry: str, machine: int, library: ctypes.CDLL | None = None) -> None:
        failure = getattr(library or kernels(), entry)(self.problem, machine)
        assert failure is None, f"{failure.decode()} in {entry} for {self.case}, machine {machine}"
        for name, buffer in self.buffers.items():
            assert buffer.intact(), f"{entry} wrote past the ends of {name} for {self.case}, machine {machine}"

    def check(self, name: str) -> None:
        got, wanted = self.buffers[name].tensor.double(), expected(self.case)[name]
        assert bool(got.isfinite().all()), f"{name} is not finite for {self.case}"
        if name == "lse":
            error = (got - wanted).abs().max().item()
            assert error < 1e-4, f"lse is off by {error:.2e} for {self.case}"
            return
        norms = wanted.norm(dim=-1)
        error = ((got - wanted).norm(dim=-1) / (norms + norms.mean() + 1e-30)).max().item()
        assert error < TOLERANCE[self.case.dtype], f"{name} is off by {error:.2e} for {self.case}"
