"""The script that proves GPU kernels, tried on the CPU; and that what is called proven has been."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_scale.ops import attention
from dflash_scale.ops.attention import ATTENTION
from dflash_scale.ops.backends import Operator, Proof
from dflash_scale.ops.pointwise import POINTWISE
from dflash_scale.ops.softmax_loss import LOSS
from tests.gpu import check, ladder
from tests.gpu.errors import TOLERANCE, where
from tests.support.attention_cases import case, outputs
from tests.support.emulated import build as emulated

RESULTS = check.ROOT / "benchmarks" / "results"


def proofs(operator: Operator[Any]) -> dict[str, Proof]:
    return {backend.name: backend.proof for backend in operator.backends if backend.proof is not None}


def test_each_proven_attention_kernel_has_passed_with_the_sources_of_today() -> None:
    for backend, proof in proofs(ATTENTION).items():
        report = json.loads((RESULTS / proof.results).read_text())
        entry = report["backends"][backend]
        again = "run benchmarks/gpu_check.sh on a GPU and renew the proof"
        assert entry["result"] == "passed", f"{backend} {entry['result']} in {proof.results}; {again}"
        assert re.search(r"NVIDIA|GeForce|Tesla", report["device"]), report["device"]
        assert entry["sources"] == proof.sources, f"{proof.results} was made with other sources of {backend}; {again}"
        assert check.source_digest(backend) == proof.sources, f"{backend} has changed since {proof.results}; {again}"


def hold_to_its_tests(operator: Operator[Any], folder: str) -> None:
    """A proof of the loss or of the pointwise operators names what their tests in tests/gpu printed on a GPU."""
    for backend, proof in proofs(operator).items():
        text, sources = (RESULTS / proof.results).read_text(), check.source_digest("", folder)
        assert re.search(r"\d+ passed", text) and not re.search("failed|error|skipped", text), proof.results
        assert proof.sources == sources, (
            f"{backend} was proven with other sources, today's are {sources}; prove it again"
        )


def test_each_proven_kernel_of_loss_and_pointwise_has_passed_with_the_sources_of_today(tmp_path: Path) -> None:
    for operator, folder in ((LOSS, "loss"), (POINTWISE, "pointwise")):
        hold_to_its_tests(operator, folder)
        (tmp_path / "log.txt").write_text("9 passed in 3.2s")
        log = os.path.relpath(tmp_path / "log.txt", RESULTS)
        today, other = (Proof(log, digest) for digest in (check.source_digest("", folder), "0"))
        hold_to_its_tests(replace(operator, backends=(replace(operator.backends[0], proof=today),)), folder)
        with pytest.raises(AssertionError, match="proven with other sources"):
            hold_to_its_tests(replace(operator, backends=(replace(operator.backends[0], proof=other),)), folder)


def test_the_checks_pass_on_the_cpu_operator(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    chosen = ["no anchor", "strides and scale", "repeats bit for bit", "large"]
    only = [word for name in chosen for word in ("--only", name)]
    assert check.main(["--device", "cpu", "--backend", "cpu", "--out", str(out), *only]) == 0
    report = json.loads(out.read_text())
    assert report["plan"]["ok"] and report["backends"]["cpu"]["result"] == "passed in part"
    assert [one["check"] for one in report["backends"]["cpu"]["checks"]] == chosen


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("row", [0, -1])
def test_one_wrong_row_is_seen(index: int, row: int) -> None:
    some = case(head_dim=64, dtype=torch.bfloat16, lengths=(400, 90))
    wanted = outputs(some, "reference", compute=torch.float64)
    got: list[Tensor] = [tensor.clone() for tensor in wanted]
    check.compare(some, got, wanted, 1e-12)
    sizes = wanted[index][:, 0].square().mean(-1)
    got[index][(sizes >= sizes.mean()).nonzero().flatten()[row], 0] *= 0.7
    with pytest.raises(AssertionError, match=f"{check.NAMES[index]} .* is off by"):
        check.compare(some, got, wanted, TOLERANCE[torch.bfloat16])


def test_a_failing_check_is_reported_and_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(backend: str, device: str) -> None:
        raise RuntimeError(f"{backend} on {device} is broken")

    monkeypatch.setattr(check, "CHECKS", {"fixed cases": broken, "no anchor": check.check_no_anchor})
    out = tmp_path / "report.json"
    assert check.main(["--device", "cpu", "--backend", "cpu", "--out", str(out)]) == 1
    entry = json.loads(out.read_text())["backends"]["cpu"]
    assert entry["result"] == "failed"
    assert [(one["ok"], one["error"]) for one in entry["checks"]] == [
        (False, "RuntimeError: cpu on cpu is broken"),
        (True, None),
    ]


def test_a_wrong_number_is_placed() -> None:
    wanted = torch.randn(300, 4, 128, dtype=torch.float64)
    got = wanted.clone()
    got[200, 3, 70] += 40.0
    place = where("out", got, wanted, 0.04)
    assert place["worst"] == {"row": 200, "head": 3, "column": 70, "tile": 1}
    assert place["wrong rows"] == [1, 1200]
    assert [i for i, x in enumerate(place["by head"]) if x > 0] == [3]
    assert [i for i, x in enumerate(place["by row in 64"]) if x > 0] == [(3 * 300 + 200) % 64]
    assert [i for i, x in enumerate(place["by 16 columns"]) if x > 0] == [4]
    assert [i for i, x in enumerate(place["by tile"]) if x > 0] == [1]
    got[17] = torch.nan
    assert where("out", got, wanted, 0.04)["not finite"] == 4 * 128


def test_the_ladder_passes_on_the_cpu_operator_and_names_the_first_wrong_rung(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [word for number in (0, 3, 8, 9) for word in ("--rung", str(number))]
    where_to = ["--device", "cpu", "--backend", "cpu", "--dump", str(tmp_path / "wrong.pt")]
    assert ladder.main([*where_to, *some]) == 0
    right = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(right) == 4 * 7 and all(line["ok"] for line in right if "ok" in line)
    # A scale that is off by two, as a wrong kernel would have it.
    monkeypatch.setattr(ladder, "anchor_attention", functools.partial(attention.anchor_attention, scale=0.5))
    assert ladder.main([*where_to, "--rung", "1"]) == 1
    wrong = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert wrong[0] == {"begins": "one unit, one tile", "rung": 1}
    assert not wrong[1]["ok"] and wrong[1]["worst"]["row"] < 16
    assert torch.load(tmp_path / "wrong.pt", weights_only=True)["out"].shape == (16, 4, 128)


def test_a_check_that_hangs_is_named(tmp_path: Path) -> None:
    program = (
        "import time; from tests.gpu import check; check.CHECKS = {'no anchor': lambda *_: time.sleep(60)};"
        "check.check_plan = lambda *_: None;"
        "check.main(['--device', 'cpu', '--backend', 'cpu', '--seconds', '3'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=check.ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].split() == ["cpu", "no", "anchor", "begins"]
    assert "Timeout" in done.stderr and "tests/gpu/check.py" in done.stderr


def test_the_probe_passes_on_the_emulated_gpu() -> None:
    library = ctypes.CDLL(str(emulated("probe.so", "-O2", source="probe.cpp")))
    library.probe.restype = ctypes.c_char_p
    for seed in range(3):
        assert library.probe(seed) is None


@pytest.mark.parametrize(
    ("run", "first", "others"),
    [
        ("proof", "loads", {"check-sm80", "train", "rows", "loss", "pointwise", "speed"}),
        ("product", "wheels", {"product", "train-peers", "flex", "memcheck"}),
    ],
)
def test_the_script_keeps_what_each_step_said(tmp_path: Path, run: str, first: str, others: set[str]) -> None:
    """With a Python that fails, and that hangs in the ladder: the archive is whole all the same."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" | grep -q ladder.py.*wrong && exec sleep 60\necho no; exit 3\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "LIMIT": "16"}
    script = check.ROOT / "benchmarks" / "gpu_check.sh"
    done = subprocess.run([script, run], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"gpu-{run}.log", f"gpu-{run}.tgz"]
    with tarfile.open(tmp_path / "out" / f"gpu-{run}.tgz") as archive:
        files = {member.name.removeprefix("./"): archive.extractfile(member) for member in archive if member.isfile()}
        steps = files["steps"].read().decode().splitlines()  # type: ignore[union-attr]
        assert files[f"{first}.txt"].read() == b"no\n"  # type: ignore[union-attr]
    outcomes = dict(line.removeprefix("== ").split(": ", 1) for line in steps)
    assert outcomes[first].startswith("exit 3, ")
    if run == "proof":
        assert outcomes["ladder-sm90"].startswith("exit 124 (out of time)")
        assert outcomes["train"].startswith("not run, ")
    assert others <= set(outcomes)


def test_the_digest_follows_includes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "attention"
    folder.mkdir(parents=True)
    (folder / "sm80_x.cu").write_text('#include "attention/a.h"\n')
    (folder / "a.h").write_text('#include "attention/b.h"\n#include <vector>\n')
    (folder / "b.h").write_text("int b;\n")
    (folder / "c.h").write_text("int c;\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    digests = [check.source_digest("sm80")]
    for name in ("c.h", "b.h", "sm80_x.cu"):
        with (folder / name).open("a") as file:
            file.write("// changed\n")
        digests.append(check.source_digest("sm80"))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    shutil.rmtree(folder)
    assert check.source_digest("sm80") == check.source_digest("sm90")  # of nothing at all
