"""generate, offline and hybrid with real embedded servers and the real launcher: what is trained is what online trains,
bit for bit, and a killed generate goes on where it was."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    AUX_LAYERS,
    REPO,
    Embedded,
    Run,
    embedded_fleet,
    random_data,
    run_config,
    tiny_verifier,
    train,
    wait_for,
)
from safetensors.torch import load_file

from dflash_scale.cache.file import BadFile
from dflash_scale.cache.folder import Cache, open_cache, read_manifest
from dflash_scale.data.dataset import Samples, load_prepared

pytestmark = pytest.mark.e2e

CONVERSATIONS = 80


@dataclass
class Inputs:
    verifier: Path
    data: Path
    servers: list[Embedded]
    samples: Samples

    def run(self, folder: Path, **stream: Any) -> Run:
        config = run_config(self.verifier, self.data, self.servers, folder, epochs=2, validate_every=5)
        config["stream"] |= stream
        return Run(folder, config)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    folder = tmp_path_factory.mktemp("inputs")
    verifier = tiny_verifier(folder / "verifier")
    data = random_data(folder, verifier, CONVERSATIONS)
    prepared = load_prepared(data)
    with embedded_fleet(verifier) as servers:
        yield Inputs(verifier, data, servers, Samples(prepared.train, prepared.validation))


def start_generate(run: Run, out: Path) -> "subprocess.Popen[str]":
    run.folder.mkdir(exist_ok=True)
    path = run.folder / "generate.json"
    path.write_text(json.dumps(run.config))
    command = [sys.executable, "-m", "dflash_scale.commands.cli", "generate", "--config", str(path), "--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=REPO, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def generate(run: Run, out: Path) -> dict[str, Any]:
    """Runs the command to its end; gives its totals."""
    process = start_generate(run, out)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    totals: dict[str, Any] = json.loads((out / "totals.json").read_text())
    assert f"{totals['present']:,} present, {totals['written']:,} written" in said
    assert totals["complete"] and totals["samples"] == CONVERSATIONS
    assert totals["present"] + totals["written"] + totals["quarantined"] == CONVERSATIONS
    return totals


def good(inputs: Inputs, folder: Path) -> set[int]:
    """The samples whose file is there and verifies."""
    origin = read_manifest(folder)
    assert origin is not None and origin.layout.layer_ids == (*AUX_LAYERS, 4)
    cache: Cache = open_cache(folder, origin.layout)
    found = set()
    for sample in range(len(inputs.samples.lengths)):
        token_ids = inputs.samples.tokens(sample).astype("<i4").tobytes()
        slot = memoryview(bytearray(len(token_ids) // 4 * origin.layout.bytes_per_token))
        try:
            cache.read(sample, token_ids, origin.layout, slot)
        except BadFile:
            continue
        found.add(sample)
    return found


def status(run: Run) -> dict[str, Any]:
    (path,) = (run.folder / "out" / "stream").glob("*-rank0.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def online(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    measured = train(inputs.run(tmp_path_factory.mktemp("online")))
    assert {line["kind"] for line in measured} == {"train", "validation"}
    return measured


@pytest.fixture(scope="module")
def states(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    assert generate(inputs.run(folder), folder / "states")["written"] == CONVERSATIONS
    assert good(inputs, folder / "states") == set(range(CONVERSATIONS))
    tensors = load_file(folder / "states" / "hs_0.safetensors")
    assert tensors["token_ids"].tolist() == inputs.samples.tokens(0).tolist()
    assert tensors["hidden_states"].shape == (inputs.samples.lengths[0], len(AUX_LAYERS) + 1, 64)
    return folder / "states"


def test_offline_trains_what_online_trains(
    inputs: Inputs, online: list[dict[str, Any]], states: Path, tmp_path: Path
) -> None:
    run = inputs.run(tmp_path, mode="offline", cache=str(states), servers=[])
    assert train(run) == online
    counts = status(run)
    assert counts["issued"] == 0 and counts["cache"]["hits"] == counts["committed"] > CONVERSATIONS
    assert counts["cache"]["misses"] == counts["cache"]["corrupt"] == 0


def test_hybrid_makes_the_other_half_and_what_is_damaged(
    inputs: Inputs, online: list[dict[str, Any]], states: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(states, half)
    for sample in range(1, CONVERSATIONS, 2):
        (half / f"hs_{sample}.safetensors").unlink()
    raw = bytearray((half / "hs_2.safetensors").read_bytes())
    raw[np.random.default_rng(0).integers(len(raw) // 2, len(raw))] ^= 64
    (half / "hs_2.safetensors").write_bytes(raw)
    run = inputs.run(tmp_path, mode="hybrid", cache=str(half))
    assert train(run) == online
    counts = status(run)["cache"]
    assert counts["corrupt"] >= 1 and counts["misses"] >= CONVERSATIONS // 2
    assert counts["written"] == counts["misses"] + counts["corrupt"] == status(run)["issued"]
    assert f"{half / 'hs_2.safetensors'} is not used" in run.log
    again = inputs.run(tmp_path / "again", mode="offline", cache=str(half), servers=[])
    assert train(again) == online


def test_a_killed_generate_goes_on_where_it_was(inputs: Inputs, tmp_path: Path) -> None:
    run, out = inputs.run(tmp_path, requests_per_server=1), tmp_path / "states"
    process = start_generate(run, out)
    wait_for(lambda: len(list(out.glob("hs_*"))) >= 10 or process.poll() is not None, 120, "ten files")
    process.kill()
    process.communicate()
    there = good(inputs, out)
    assert 10 <= len(there) < CONVERSATIONS, "it was to be killed in the middle"
    assert len(list(out.glob("hs_*"))) == len(there), "a file that has its name is whole"
    totals = generate(inputs.run(tmp_path), out)
    assert (totals["present"], totals["written"]) == (len(there), CONVERSATIONS - len(there))
    assert good(inputs, out) == set(range(CONVERSATIONS))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_signal_ends_generate_with_its_totals(inputs: Inputs, tmp_path: Path) -> None:
    run, out = inputs.run(tmp_path, requests_per_server=1), tmp_path / "states"
    process = start_generate(run, out)
    wait_for(lambda: len(list(out.glob("hs_*"))) >= 10 or process.poll() is not None, 120, "ten files")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    totals = json.loads((out / "totals.json").read_text())
    assert not totals["complete"] and totals["written"] == len(good(inputs, out)) < CONVERSATIONS


def test_the_cache_of_another_run_is_refused_before_anything_starts(
    inputs: Inputs, states: Path, tmp_path: Path
) -> None:
    run = inputs.run(tmp_path, mode="offline", cache=str(states))
    run.config["verifier"]["layer_ids"] = [1, 3]
    run.launch(ranks=1)
    assert run.wait() != 0
    assert f"stream.cache: {states} is another run's: it has layers [1, 2, 4], this run wants [1, 3, 4]" in run.log
    assert not (tmp_path / "out" / "stream").exists()


def test_samples_unaccounted_for_are_the_runs_status(inputs: Inputs, states: Path, tmp_path: Path) -> None:
    """A line of the ledger is damaged after the run, and its last step is trained again."""
    run = inputs.run(tmp_path, mode="offline", cache=str(states), servers=[])
    run.config["train"] |= {"epochs": 1, "checkpoint_every": 1, "keep_checkpoints": 99}
    train(run)
    ledger = run.folder / "out" / "ledger" / "rank-0.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines[0]["samples"].pop()
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "out" / "checkpoints" / "latest").write_text(f"step-{lines[-1]['step'] - 1:06}")
    run.launch("--resume", ranks=1)
    assert run.wait() == 3, run.log[-3000:]
    assert "1 samples of this epoch are unaccounted for, 0 were trained twice" in run.log
    assert json.loads((run.folder / "out" / "totals.json").read_text())["unbalanced"] == 1
