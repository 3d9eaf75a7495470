"""In which order the attention's benchmark works, and that what is measured is in the file at once; on the CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_attention
from benchmarks.attention_problems import Attend, Problem

SMALL = [Problem(name, 48, 2, 6, 4, heads=4, key_heads=2, head_dim=8, dtype="float32") for name in ("one", "two")]


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(bench_attention, "CPU_PROBLEMS", SMALL)
    monkeypatch.setattr(bench_attention, "limits", lambda device, dtype: (1e11, 1e10))
    monkeypatch.setattr(bench_attention, "peak_cpu", lambda problem, name: 1 << 20)
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", "--repeats", "1", "--out", str(out), *arguments])
    return bench_attention.main(), json.loads(out.read_text())


def test_our_kernels_come_first_and_each_row_is_in_the_file_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    seen: list[tuple[str, str]] = []

    def look(row: dict[str, Any]) -> None:
        kept = json.loads(out.read_text())
        assert [(one["case"], one["implementation"]) for one in kept["results"]] == seen
        assert not any("create_block_mask" in times for times in kept["plans"].values())
        seen.append((row["case"], row["implementation"]))

    monkeypatch.setattr(bench_attention, "print_row", look)
    code, result = run(monkeypatch, out, "--block-mask")
    assert code == 0
    assert seen == [("one", "cpu"), ("two", "cpu"), ("one", "sdpa"), ("two", "sdpa")]
    assert len(result["results"]) == 4
    assert all(0 < row["off_by"] < 1e-5 for row in result["results"][2:])
    assert all(set(times) == {"plan", "create_block_mask"} for times in result["plans"].values())
    assert {ratio["to"] for ratio in result["ratios"]} == {"sdpa"}


def test_what_fails_is_named_and_the_rest_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = bench_attention.measure

    def broken(attend: Attend, tensors: tuple[Any, ...], repeats: int) -> Any:
        if "dense_sdpa" in attend.__qualname__ and len(calls) < 1:
            calls.append(attend)
            raise RuntimeError("no peer")
        return measure(attend, tensors, repeats)

    calls: list[Callable[..., Any]] = []
    monkeypatch.setattr(bench_attention, "measure", broken)
    code, result = run(monkeypatch, tmp_path / "out.json")
    assert code == 1
    assert result["failures"] == ["one: sdpa: RuntimeError: no peer"]
    assert [row["case"] for row in result["results"] if "both_s" in row] == ["one", "two", "two"]
