"""What a run writes down survives kills and resumes without counting a step twice."""

import json
from pathlib import Path

import pytest
import torch

from dflash_scale.ops.softmax_loss import term_weights
from dflash_scale.training.ledger import JsonLines, keep_until
from dflash_scale.training.metrics import Metrics
from dflash_scale.training.sums import BlockSums, block_metrics


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_of_later_steps_and_half_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    keep_until(path, 3)
    assert steps(path) == [1, 2, 3]
    lines = JsonLines(path, first_step=3)
    lines.write({"step": 3, "again": True})
    lines.close()
    assert steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["again"]


def test_scalars_reach_tensorboard_and_lists_only_the_lines(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, 1, tensorboard=True)
    metrics.write("train", 7, {"loss": 1.5, "accuracy_by_position": [0.5, 0.25]})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"kind": "train", "step": 7, "loss": 1.5, "accuracy_by_position": [0.5, 0.25]}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 1.5)]


def test_means_of_sums() -> None:
    sums = BlockSums(
        loss=torch.tensor(6.0),
        blocks=torch.tensor(4.0),
        compared=torch.tensor(7.0),
        agreed=torch.tensor(3.5),
        terms=torch.tensor(term_weights({"ce": 4.5, "tv": 3.0})),
        top=torch.tensor([6.0, 7.0]),
        trained=torch.tensor([4.0, 3.0, 0.0]),
        correct=torch.tensor([3.0, 2.0, 0.0]),
        accepted=torch.tensor([3.0, 1.0, 0.0]),
    )
    means = block_metrics(sums, normaliser=3.0)
    assert means["loss"] == 2.0 and means["ce"] == 1.5 and means["tv"] == 1.0
    assert "kl" not in means and "reverse_kl" not in means
    assert means["top_4"] == pytest.approx(6 / 7) and means["top_8"] == 1.0
    assert means["verifier_agreement"] == 0.5
    assert means["accuracy"] == pytest.approx(5 / 7)
    assert means["acceptance_length"] == 2.0
    assert means["accuracy_by_position"] == pytest.approx([0.75, 2 / 3, 0.0])
    assert means["acceptance_by_position"] == [0.75, 0.25, 0.0]


def test_no_comparison_with_the_verifier_is_no_agreement() -> None:
    assert "verifier_agreement" not in block_metrics(BlockSums.unpacked(torch.zeros(BlockSums.size(4))), 1.0)
