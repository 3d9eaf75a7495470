"""What a person sees: the progress line and the plots."""

import json
from pathlib import Path
from typing import get_args

import pytest

from dflash_scale.config.stream import StreamSection
from dflash_scale.training.metrics import SOURCES, ProgressLine, bottleneck
from launch.demo.plots import plot_acceptance, plot_training, read_metrics

VALUES = {"loss": 1.25, "acceptance_length": 2.5, "tokens_per_s": 12345.0, "wait_data": 0.4}


def test_the_line_names_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(10, 0, "servers", enabled=True)
    line.train(5, VALUES)
    line.validation(5, {"acceptance_length": 2.25})
    line.train(6, {**VALUES, "wait_data": 0.01})
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "step 5/10 · loss 1.250 · acceptance 2.50 · 12,345 tok/s · wait_data 40% · bottleneck: servers"
    assert "validation 2.25" in shown[1] and "validation 2.25" in shown[2]
    assert shown[2].endswith("wait_data 1% · bottleneck: training")
    assert [bottleneck(share, "cache") for share in (0.0, 0.1, 0.2)] == ["training", "training", "cache"]


def test_every_mode_has_a_bottleneck_to_name() -> None:
    assert set(SOURCES) == set(get_args(StreamSection.model_fields["mode"].annotation))


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(10, 0, "cache", enabled=False)
    line.train(5, VALUES)
    line.validation(5, VALUES)
    line.close()
    assert capsys.readouterr() == ("", "")


def test_plots_are_pictures(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"kind": kind, "step": step, **VALUES} for kind in ("train", "validation") for step in (1, 2)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["step"] for line in read_metrics(metrics, "validation")] == [1, 2]
    plot_training(metrics, tmp_path / "training.png")
    plot_acceptance({"trained": [0.9, 0.5], "untrained": [0.1, 0.0]}, tmp_path / "acceptance.png")
    for name in ("training.png", "acceptance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000
