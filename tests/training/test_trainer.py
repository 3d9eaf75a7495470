"""The trainer under a real DeepSpeed launch: the gradient does not depend on how samples fall into rows, micro-steps
and ranks, or on the ZeRO stage; a resumed run equals the uninterrupted one bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dflash_scale.config.run import parse_config
from dflash_scale.data.dataset_writer import FEATURES, FORMAT
from dflash_scale.server.process import free_port
from dflash_scale.training.optim import engine_config, lr_factor

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("trainer_worker.py")
# The loss section of each baseline: both weights, and all terms with the verifier's labels.
LOSSES = {
    "decay": {"weights": "decay"},
    "dpace": {"weights": "dpace"},
    "soft": {"labels": "verifier", "terms": {"ce": 1.0, "kl": 0.5, "reverse_kl": 0.2, "tv": 0.3}},
}


def settings(rows: int, row_tokens: int, loss: str = "decay", stage: int = 2, **train: object) -> dict:
    return {
        "verifier": {"model": "tiny-qwen3", "layer_ids": [1, 3]},
        "drafter": {"layers": 2, "block_size": 4, "mask_token_id": 63},
        "data": {"path": "unused", "row_tokens": row_tokens, "anchors_per_document": 4},
        "stream": {"mode": "fake"},
        "loss": {**LOSSES[loss], "chunk_slots": 5},
        "train": {
            "rows_per_step": rows,
            "precision": "fp32",
            "lr": 1e-2,
            "warmup_ratio": 0.0,
            "epochs": 1,
            "validate_every": 0,
            "log_every": 1,
            **train,
        },
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }


def write_data(folder: Path) -> str:
    """A prepared data set: 12 samples to train on, 4 to validate, of 9 to 15 random tokens: none share a row of 16."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        tokens = [rng.integers(0, 63, length, np.int32) for length in rng.integers(9, 16, count)]
        masks = [(np.arange(len(ids)) >= 2).astype(np.int8) for ids in tokens]
        rows = datasets.Dataset.from_dict({"input_ids": tokens, "loss_mask": masks}, features=FEATURES)
        rows.save_to_disk(folder / split)
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "fingerprint": "random tokens"}))
    return str(folder)


def deepspeed(world: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("deepspeed"), f"--num_accelerators={world}"]
    command += [f"--master_port={free_port()}", *arguments]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",  # other tests may run beside these, on the same cores
    }
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


def launch(world: int, config: dict, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    path, data = out / "config.json", out / "data"
    content = {**config, "train": {**config["train"], "output_dir": str(out)}}
    content["data"] = {**config["data"], "path": str(data) if data.exists() else write_data(data)}
    path.write_text(json.dumps(content))
    done = deepspeed(world, WORKER, path, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return load_file(out / "state.safetensors")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """One rank, one document a row, all 12 documents in one optimizer step."""
    return {loss: launch(1, settings(12, 16, loss), tmp_path_factory.mktemp(loss)) for loss in LOSSES}


@pytest.mark.parametrize(
    ("world", "rows", "row_tokens", "loss", "stage"),
    [
        (2, 12, 16, "decay", 2),  # 2 ranks, 6 micro-steps
        (1, 4, 64, "decay", 2),  # several documents a row, and an empty row
        (2, 4, 64, "dpace", 1),
        (2, 12, 16, "dpace", 3),  # and with activation checkpointing
        (2, 4, 64, "soft", 2),
    ],
)
def test_gradient_is_the_same_however_samples_fall(
    baseline: dict, tmp_path: Path, world: int, rows: int, row_tokens: int, loss: str, stage: int
) -> None:
    got = launch(world, settings(rows, row_tokens, loss, stage, activation_checkpointing=stage == 3), tmp_path)
    wanted = baseline[loss]
    gradients = [name for name in wanted if name.startswith("gradient.")]
    assert gradients
    for name in gradients:
        scale = wanted[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5 * float(scale), msg=name)


def test_pruned_vocabulary(baseline: dict, tmp_path: Path) -> None:
    """The gradient is the same however samples fall, not that of the whole vocabulary, and what is left out counts."""

    def pruned(rows: int, row_tokens: int, size: int) -> dict:
        content = settings(rows, row_tokens, validate_every=1)
        return {**content, "drafter": {**content["drafter"], "vocab_size": size}}

    alone, spread = (launch(w, pruned(*rows, 40), tmp_path / f"{w}") for w, rows in ((1, (12, 16)), (2, (4, 64))))
    for name in (name for name in alone if name.startswith("gradient.")):
        scale = float(alone[name].abs().max())
        torch.testing.assert_close(spread[name], alone[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
        assert not torch.allclose(alone[name], baseline["decay"][name], rtol=1e-2, atol=1e-2 * scale), name
    lines = [[json.loads(line) for line in (tmp_path / w / "metrics.jsonl").read_text().splitlines()] for w in "12"]
    shares = [[(line["kind"], line["outside_vocabulary"]) for line in run] for run in lines]
    assert shares[0] == shares[1] and all(0.1 < share < 0.9 for _, share in shares[0]) and len(shares[0]) == 2
    d2t = np.load(tmp_path / "2" / "checkpoints" / "step-000001" / "d2t.npy")
    assert d2t.shape == (40,) and (np.diff(d2t) >= 0).all()


def test_bf16_with_fp32_masters_follows_fp32(baseline: dict, tmp_path: Path) -> None:
    got, wanted = launch(2, settings(4, 64, precision="bf16"), tmp_path), baseline["decay"]
    for name in wanted:
        if name.startswith("gradient."):
            similarity = torch.cosine_similarity(got[name].flatten(), wanted[name].flatten(), dim=0)
            assert similarity > 0.98, (name, float(similarity))


def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    config = settings(2, 64, epochs=3, checkpoint_every=2, validate_every=2)
    whole = launch(2, config, tmp_path)
    ledger = [(tmp_path / "ledger" / f"rank-{rank}.jsonl").read_text() for rank in range(2)]
    (tmp_path / "checkpoints" / "latest").write_text("step-000002")
    (tmp_path / "state.safetensors").unlink()
    resumed = launch(2, config, tmp_path, "--resume")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    assert [(tmp_path / "ledger" / f"rank-{rank}.jsonl").read_text() for rank in range(2)] == ledger
    per_epoch: dict[int, list[int]] = {}
    for line in "".join(ledger).splitlines():
        entry = json.loads(line)
        per_epoch.setdefault(entry["epoch"], []).extend(entry["samples"])
    assert {epoch: sorted(samples) for epoch, samples in per_epoch.items()} == {e: list(range(12)) for e in range(3)}
    assert json.loads((tmp_path / "totals.json").read_text())["unbalanced"] == 0


def test_a_signal_while_a_step_waits_for_data_leaves_that_step_to_the_resumed_run(tmp_path: Path) -> None:
    """One rank has begun step 2 and waits for its second row of it; the other one has all of its data."""
    config = settings(4, 16, checkpoint_every=9)
    whole = launch(2, config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    launch(2, config, stopped, "--stall", "3")
    totals = json.loads((stopped / "totals.json").read_text())
    assert totals == {"trained": 4, "validated": 0, "quarantined": 0, "complete": False, "step": 1, "unbalanced": 0}
    assert (stopped / "checkpoints" / "latest").read_text() == "step-000001"
    resumed = launch(2, config, stopped, "--resume")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    assert json.loads((stopped / "totals.json").read_text())["complete"]


def test_a_signal_while_validation_waits_for_data_ends_the_run_with_the_step_before_it(tmp_path: Path) -> None:
    launch(2, settings(4, 16, checkpoint_every=9, validate_every=1), tmp_path, "--stall", "3")
    totals = json.loads((tmp_path / "totals.json").read_text())
    assert (totals["step"], totals["trained"], totals["complete"]) == (1, 4, False)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000001"
    assert [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ["train"]


def test_samples_unaccounted_for_are_seen_after_a_resume(tmp_path: Path) -> None:
    config = settings(2, 64, epochs=2, checkpoint_every=1, keep_checkpoints=9)
    launch(1, config, tmp_path)
    assert json.loads((tmp_path / "totals.json").read_text())["unbalanced"] == 0
    path = tmp_path / "ledger" / "rank-0.jsonl"
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    assert rest[0]["epoch"] == first["epoch"], "the epoch has a second step"
    first["samples"].append(first["samples"].pop() + 100)
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, *rest)))
    (tmp_path / "checkpoints" / "latest").write_text("step-000001")
    launch(1, config, tmp_path, "--resume")
    assert json.loads((tmp_path / "totals.json").read_text())["unbalanced"] == 2, "one is missing, one is not wanted"


def test_the_debug_configuration_trains_on_its_own_and_resumes(tmp_path: Path) -> None:
    debug = (ROOT / "launch" / "train.py", "--config", ROOT / "configs" / "debug.json")
    debug = (*debug, "--set", f"train.output_dir={tmp_path}")

    def losses() -> dict[int, float]:
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    done = deepspeed(1, *debug)
    assert done.returncode == 0, done.stderr[-6000:]
    whole = losses()
    assert list(whole) == [5, 10, 15, 20, 25, 30] and whole[30] < 0.85 * whole[5]
    totals = json.loads((tmp_path / "totals.json").read_text())
    assert totals["complete"] and totals["unbalanced"] == totals["quarantined"] == 0 and totals["validated"] == 48
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000030"
    (tmp_path / "checkpoints" / "latest").write_text("step-000020")
    done = deepspeed(1, *debug, "--resume")
    assert done.returncode == 0, done.stderr[-6000:]
    assert losses() == pytest.approx(whole, rel=1e-5)
    assert json.loads((tmp_path / "totals.json").read_text())["validated"] == 16, "nothing before the checkpoint again"


def test_a_step_that_was_not_applied_is_an_error_and_not_in_the_ledger(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"step 1: the gradient is not finite.*\b3\b"):
        launch(1, settings(4, 64), tmp_path, "--poison")
    assert (tmp_path / "ledger" / "rank-0.jsonl").read_text() == ""


def test_learning_rate_warms_up_and_falls_to_the_floor() -> None:
    factors = [lr_factor(step, 100, 0.1, 0.2) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0) and max(factors) == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.2)


def test_engine_settings_follow_from_the_configuration() -> None:
    content = settings(12, 16)
    content["train"].update(precision="bf16", clip=0.5)
    got = engine_config(parse_config(content), world_size=4)
    assert got["train_batch_size"] == 12 and got["gradient_accumulation_steps"] == 3
    assert got["gradient_clipping"] == 0.5 and got["bf16"] == {"enabled": True}
    assert got["zero_optimization"] == {"stage": 2}
