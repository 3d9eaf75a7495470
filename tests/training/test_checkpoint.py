"""Checkpoints on disk: what a kill leaves, what is kept. Saving and loading under DeepSpeed: test_trainer.py."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dflash_scale.config.run import parse_config
from dflash_scale.files import write_file
from dflash_scale.training.checkpoint import Checkpoints, Position
from dflash_scale.training.run import resolve_run, resolve_verifier

POSITION = Position(
    step=3, best_acceptance_length=1.5, world_size=2, rows_per_step=8, row_tokens=64, seed=0, data="data"
)


def make_checkpoints(folder: Path, keep: int) -> Checkpoints:
    drafter = {"mask_token_id": 9}
    config = parse_config({"verifier": {"model": "Qwen/Qwen3-8B"}, "data": {"path": "unused"}, "drafter": drafter})
    return Checkpoints(folder, keep, resolve_run(config, resolve_verifier(config), None, None))


def fill(folder: Path, names: list[str], **pointers: str) -> Checkpoints:
    for name in names:
        (folder / name).mkdir(parents=True)
    for pointer, name in pointers.items():
        write_file(folder / pointer, name)
    return make_checkpoints(folder, keep=2)


def test_what_an_interrupted_save_left_is_removed(tmp_path: Path) -> None:
    checkpoints = fill(tmp_path, ["step-000010", "step-000020.partial"], latest="step-000010")
    (tmp_path / "latest.partial").write_text("step-000020")
    checkpoints.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000010"]
    assert checkpoints.latest() == tmp_path / "step-000010"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    names = [f"step-{step:06d}" for step in (10, 20, 30, 40)]
    checkpoints = fill(tmp_path, names, latest="step-000040", best="step-000010")
    checkpoints._remove_old()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000010", "step-000030", "step-000040"]


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume: no checkpoint in"):
        make_checkpoints(tmp_path, keep=1).load(None, POSITION)


def test_a_checkpoint_of_a_version_before_run_json_is_not_resumed(tmp_path: Path) -> None:
    checkpoints = fill(tmp_path, ["step-000010"], latest="step-000010")
    (tmp_path / "step-000010" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-000010: got no run\.json, wanted .* with the version that wrote it"):
        checkpoints.load(None, POSITION)


def test_resume_refuses_another_schedule(tmp_path: Path) -> None:
    checkpoints = fill(tmp_path, ["step-000003"], latest="step-000003")
    checkpoints._run.save(tmp_path / "step-000003")
    (tmp_path / "step-000003" / "position.json").write_text(json.dumps(asdict(POSITION)))
    with pytest.raises(ValueError, match=r"--resume: seed is 9, but .* was trained with 0"):
        checkpoints.load(None, replace(POSITION, seed=9))
