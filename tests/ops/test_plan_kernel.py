"""The source of the plan's GPU kernel on an emulated GPU (tests/emulator): the same integers as the CPU operator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash_scale.ops.attention_plan import TILE, build_plan, item_positions
from tests.support.attention_cases import Case, case, cases

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DDFLASH_EMULATE")
OUTPUTS = ("starts", "ends", "tile_ranges", "order", "tile_order")
GUARD = -777


class PlanArgs(ctypes.Structure):
    """`PlanArgs` of csrc/attention/plan.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("anchors", "doc_ids")),
        *((name, ctypes.c_int32) for name in ("num_anchors", "num_tokens", "block_size", "window", "group")),
        *((name, ctypes.c_void_p) for name in OUTPUTS),
    )


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    assert compiler is not None, "the emulated kernel needs g++"
    target, folder = tmp_path_factory.mktemp("emulator") / "plan.so", ROOT / "tests" / "emulator"
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{folder}", str(folder / "plan.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, timeout=300)
    library = ctypes.CDLL(str(target))
    library.plan.restype, library.plan.argtypes = ctypes.c_char_p, (ctypes.POINTER(PlanArgs), ctypes.c_uint)
    return library


def emulate(kernel: ctypes.CDLL, anchors: Tensor, doc_ids: Tensor, options: dict[str, int], seed: int) -> list[Tensor]:
    """The five outputs, each checked to be written nowhere beyond its end."""
    count, tiles = anchors.numel(), -(-doc_ids.numel() // TILE)
    items = -(-count * options["block_size"] // item_positions(options["group"]))
    sizes = (count, count, 2 * tiles, items, tiles)
    outputs = [torch.full((size + 64,), GUARD, dtype=torch.int32) for size in sizes]
    args = PlanArgs(
        anchors.data_ptr(), doc_ids.data_ptr(), count, doc_ids.numel(), options["block_size"], options["window"],
        options["group"], *(output.data_ptr() for output in outputs),
    )  # fmt: skip
    fault = kernel.plan(ctypes.byref(args), seed)
    assert fault is None, fault.decode()
    for name, output, size in zip(OUTPUTS, outputs, sizes, strict=True):
        assert (output[size:] == GUARD).all(), f"{name} is written beyond its {size} numbers"
    return [output[:size] for output, size in zip(outputs, sizes, strict=True)]


def check(kernel: ctypes.CDLL, some: Case, seed: int) -> None:
    plan = some.plan()
    options = {"block_size": some.block_size, "window": some.window or 0, "group": some.group}
    for name, got in zip(OUTPUTS, emulate(kernel, plan.anchors, plan.doc_ids, options, seed), strict=True):
        assert torch.equal(got, getattr(plan, name).flatten()), f"{name} for {some}"


@settings(max_examples=10, deadline=None)
@given(some=cases(), seed=st.integers(0, 1000))
def test_equals_the_cpu_operator(kernel: ctypes.CDLL, some: Case, seed: int) -> None:
    check(kernel, some, seed)


@pytest.mark.parametrize(
    "some",
    [
        case(lengths=(70_000, 1, 20_000, 500), density=0.02, block_size=16, group=4),
        case(lengths=(40_000,), density=0.05, block_size=16, group=65, window=300),
        case(lengths=(1,) * 200, padding=0, density=1.0, group=8),
        case(density=0.0),
        case(lengths=(3,), padding=0, density=1.0),
    ],
)
def test_long_rows_and_empty_ones(kernel: ctypes.CDLL, some: Case) -> None:
    check(kernel, some, 7)


def test_wrong_anchors_touch_no_foreign_memory(kernel: ctypes.CDLL) -> None:
    """On a GPU they cannot be refused without a sync: the plan is wrong then, and its order is still an order."""
    anchors = torch.tensor([900, -5, 2**31 - 1, 3, 700, -(2**31)], dtype=torch.int32)
    options = {"block_size": 16, "window": 7, "group": 4}
    *_, order, tile_order = emulate(kernel, anchors, torch.zeros(1000, dtype=torch.int32), options, 3)
    assert sorted(order.tolist()) == list(range(3))
    assert sorted(tile_order.tolist()) == list(range(8))
    with pytest.raises(ValueError, match="anchors must"):
        build_plan(anchors, torch.zeros(1000, dtype=torch.int32), block_size=16)
