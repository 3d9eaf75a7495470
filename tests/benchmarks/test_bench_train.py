"""The benchmark of the training step, on the CPU: what it counts, and that a peer's parts compute what ours do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_train, train_peers
from benchmarks.attention_problems import mask_function
from benchmarks.train_cases import CPU_CASES, GPU_CASES, MASK_TOKEN, Case, drafter_spec, make_row, padded, row_flop
from benchmarks.train_engine import planned_bytes, run_config, verifier_shape
from benchmarks.train_peers import OURS, PEERS, TOGETHER
from benchmarks.train_step import Options, Step, covered
from dflash_scale.drafter import model
from dflash_scale.ops.attention_plan import Plan, build_plan
from dflash_scale.training.memory import activation_bytes
from dflash_scale.verifier.shape import verifier_shape as shipped_shape

ROOT = Path(__file__).parents[2]
SMALL = replace(CPU_CASES[2], documents=2, tokens=24, anchors=14, block=4, hidden=32, inner=48, vocabulary=96)
# The name chooses a case; what is run in its place is small.
NAME = CPU_CASES[2].name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the benchmark has it on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str, case: Case = SMALL) -> tuple[int, dict[str, Any]]:
    """Exit code and the one case's entry."""
    monkeypatch.setattr(bench_train, "CPU_CASES", (replace(case, name=NAME),))
    monkeypatch.setattr(bench_train, "limits", lambda device, dtype: (1e11, 1e10))
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--repeats", "1", "--out", str(out), *arguments])
    code = bench_train.main()
    (entry,) = json.loads(out.read_text())["results"]
    return code, entry


@pytest.mark.parametrize("term", ["ce", "kl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peers_parts_give_our_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, term: str, dtype: str
) -> None:
    case = replace(SMALL, term=term, dtype=dtype)
    assert len(make_row(case, "cpu").anchors) < case.documents * case.anchors, "no anchor to pad with"
    code, entry = run(monkeypatch, tmp_path / "out.json", "--peers", case=case)
    assert code == 0
    variants = {row["variant"]: row for row in entry["variants"]}
    assert list(variants) == [OURS.name, *(peer.name for peer in PEERS)]
    for row in variants.values():
        assert row["row_s"] > 0 and set(row["parts_s"]) == set(bench_train.PARTS) and row["profile"]["top"]
        assert row["mfu"] == pytest.approx(sum(entry["flop"].values()) / row["row_s"] / 1e11)
    # Each did something else on the way.
    assert all(variants[peer.name]["gradient_off_by"] > 0 for peer in PEERS if peer != PEERS[2])


def other_documents(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan, *, backend: str
) -> Tensor:
    """A peer whose mask forgets that documents end."""
    whole = build_plan(plan.anchors, torch.zeros_like(plan.doc_ids), block_size=plan.block_size, group=plan.group)
    return train_peers.dense_sdpa(whole)(q, k_ctx, v_ctx, k_blk, v_blk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str
) -> None:
    monkeypatch.setattr("benchmarks.train_step.peers_attention", other_documents)
    code, entry = run(monkeypatch, tmp_path / "out.json", "--peers", case=replace(SMALL, dtype=dtype))
    assert code == 1
    wrong = [row["variant"] for row in entry["variants"] if row.get("failed", "").startswith("Disagreement")]
    assert wrong == [PEERS[0].name, TOGETHER.name]
    assert all("row_s" in row for row in entry["variants"] if row["variant"] not in wrong)


def test_too_little_memory_is_a_result_and_the_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = bench_train.measure

    def short(step: Step) -> dict[str, Any]:
        if step.variant.full_logits and not step.variant.padded:
            raise torch.OutOfMemoryError("all logits at once")
        return measure(step)

    monkeypatch.setattr(bench_train, "measure", short)
    code, entry = run(monkeypatch, tmp_path / "out.json", "--peers")
    assert code == 0
    assert [row.get("out_of_memory") for row in entry["variants"]] == [None, None, "all logits at once", None, None]


def test_a_case_that_cannot_be_described_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(case: Case, options: Options, peak: float) -> dict[str, Any]:
        raise RuntimeError("no plan")

    monkeypatch.setattr(bench_train, "describe", broken)
    code, entry = run(monkeypatch, tmp_path / "out.json")
    assert code == 1
    assert entry == {"case": NAME, "failed": "RuntimeError: no plan"}


@pytest.mark.parametrize("term", ["ce", "kl"])
def test_products_are_counted_as_torch_counts_them(term: str) -> None:
    step = Step(replace(SMALL, term=term), Options("cpu", attention="cpu"))
    counter = FlopCounterMode(display=False)
    with counter:
        step.backward(step.loss(step.forward()))
    flop = row_flop(step.case, step.row)
    assert flop["products"] + flop["fc"] + flop["head"] == counter.get_total_flops()


def test_attention_is_counted_by_the_mask() -> None:
    row = make_row(SMALL, "cpu")
    plan = build_plan(row.anchors, row.doc_ids, block_size=SMALL.block)
    rows = torch.arange(row.labels.numel())[:, None]
    keys = torch.arange(SMALL.tokens + row.labels.numel())[None]
    pairs = int(mask_function(plan)(rows, rows, rows, keys).sum())
    # Two products forward, five backward, two operations per number of a head.
    wanted = 7 * 2 * pairs * SMALL.head_dim * SMALL.heads * SMALL.layers
    assert row_flop(SMALL, row)["attention"] == wanted


def test_added_anchors_train_nothing() -> None:
    row = make_row(SMALL, "cpu")
    more = padded(row, len(row.anchors) + 3)
    assert more.trained.sum() == row.trained.sum() == len(row.kept)
    for name in ("anchors", "labels"):
        assert torch.equal(getattr(more, name)[3:], getattr(row, name))
    assert torch.equal(more.labels.flatten()[more.kept], row.labels.flatten()[row.kept])


@pytest.mark.parametrize("case", [*GPU_CASES, *CPU_CASES], ids=lambda case: case.name)
def test_the_drafter_is_the_one_that_the_configuration_gives(case: Case) -> None:
    config = run_config(case, Options("cpu"))
    aux_layers = tuple(range(case.aux_layers))
    spec = model.drafter_spec(config.drafter, verifier_shape(case), aux_layers, MASK_TOKEN)
    mine = drafter_spec(case)
    assert spec.layers.to_dict() == mine.layers.to_dict()
    assert replace(spec, layers=mine.layers) == mine


def test_gpu_cases_have_qwen3_8bs_shapes() -> None:
    shape = shipped_shape("Qwen/Qwen3-8B")
    for case in GPU_CASES:
        mine = verifier_shape(case)
        assert replace(shape, layers=mine.layers) == mine


def test_the_planners_figure_is_of_the_row_that_is_drawn() -> None:
    row, options = make_row(SMALL, "cpu"), Options("cpu")
    spec = drafter_spec(SMALL)
    more = padded(row, len(row.anchors) + 5)
    added = planned_bytes(SMALL, more, options) - planned_bytes(SMALL, row, options)
    activations = (activation_bytes(spec, each.labels.numel(), SMALL.tokens, 4) for each in (more, row))
    assert added >= next(activations) - next(activations) > 0


def test_the_union_of_intervals_is_measured() -> None:
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 4), (1, 3)]) == 5


WITHOUT = """
import sys
from dataclasses import replace
for name in ("pydantic", "deepspeed", "datasets", "zmq", "psutil"):
    sys.modules[name] = None
from benchmarks import bench_train
bench_train.limits = lambda device, dtype: (1e11, 1e10)
sys.argv[1:] = ["--engine", "--repeats", "1", "--case", bench_train.CPU_CASES[2].name]
raise SystemExit(bench_train.main())
"""


def test_it_runs_without_pydantic_and_deepspeed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "planned memory: left out: needs pydantic" in done.stdout
    assert "DeepSpeed engine  left_out: needs pydantic, which is not installed" in done.stdout


def test_the_engine_takes_the_same_step(tmp_path: Path) -> None:
    """In a process of its own, which joins a process group."""
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/bench_train.py", "--engine", "--rows", "2", "--repeats", "1"]
    command += ["--case", CPU_CASES[4].name, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads(out.read_text())["results"]
    engine = entry["variants"][1]
    assert engine["variant"] == "DeepSpeed engine" and engine["gradient_off_by"] < 0.01 and engine["time_ratio"] > 0
