"""The program of the trainer up to its first rank; whole runs: tests/training/test_trainer.py and tests/e2e."""

import os
import subprocess
import sys

import pytest

from dflash_scale.receiver.client import RankPlace
from dflash_scale.training.distributed import launched_place
from tests.support.command import ROOT


def test_without_a_launcher_one_sentence_says_how_to_start_it() -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(ROOT / "configs" / "demo.json")]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "dflash-scale train: got no RANK in the environment; start it with `dflash-scale train` or `deepspeed`\n"
    )


@pytest.mark.parametrize("local_size", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_both_launchers_say_where_a_rank_runs(monkeypatch: pytest.MonkeyPatch, local_size: str) -> None:
    for name in ("RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_place() is None
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local_size: "4"}.items():
        monkeypatch.setenv(name, value)
    assert launched_place() == RankPlace(rank=5, world_size=8, local_rank=1, local_size=4)
