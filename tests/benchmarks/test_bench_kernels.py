"""The benchmark of this library's kernels alone, on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_kernels
from benchmarks.attention_problems import Problem

SMALL = [Problem(name, 48, 2, 6, 4, heads=4, key_heads=2, head_dim=8, dtype="float32") for name in ("one", "two")]


def test_forward_backward_and_each_kernel_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, bench = tmp_path / "out.json", bench_kernels.bench

    def broken(problem: Problem, kernel: str, repeats: int, device: str) -> dict[str, object]:
        if problem.name == "one":
            raise RuntimeError("a kernel that faults")
        assert len(json.loads(out.read_text())["results"]) == 1, "what came before is not in the file"
        return bench(problem, kernel, repeats, device)

    monkeypatch.setattr(bench_kernels, "CPU_PROBLEMS", SMALL)
    monkeypatch.setattr(bench_kernels, "bench", broken)
    monkeypatch.setattr(bench_kernels, "product_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--repeats", "2", "--out", str(out)])
    assert bench_kernels.main() == 1
    first, second = json.loads(out.read_text())["results"]
    assert first == {"case": "one", "kernel": "cpu", "failed": "RuntimeError: a kernel that faults"}
    assert set(second["kernels_s"]) == {"anchor_attention", "anchor_attention_backward"}
    flop = SMALL[1].flop(SMALL[1].plan("cpu"))
    for part, count in zip(("forward", "backward"), flop, strict=True):
        assert second[f"{part}_tflops"] == pytest.approx(count / second[f"{part}_s"] / 1e12)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("void dflash::gpu::sm90::backward_dq<128, (dflash::Half)1>(dflash::gpu::sm90::DqParameters)", "backward_dq"),
        ("dflash::gpu::plan_kernel(dflash::PlanArgs)", "plan_kernel"),
        ("dflash_scale::anchor_attention_backward", "anchor_attention_backward"),
    ],
)
def test_a_kernels_name_is_short(name: str, wanted: str) -> None:
    assert bench_kernels.short(name) == wanted
