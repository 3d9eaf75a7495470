"""The verifier's own answers with a real embedded server: the data set, the cache, and a run that trains on them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import AUX_LAYERS, REPO, VOCAB, Embedded, Run, embedded_fleet, run_config, tiny_verifier, train, wait_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dflash_scale.commands import answer, cli
from dflash_scale.data.dataset import Samples, load_prepared
from dflash_scale.server.transformers_server import TransformersVerifier

pytestmark = pytest.mark.e2e

PROMPTS = 60
ANSWER = 24
FRACTION = "0.1"


@dataclass
class Inputs:
    folder: Path
    verifier: Path
    source: Path
    servers: list[Embedded]

    def run(self, folder: Path, data: Path, **stream: Any) -> Run:
        config = run_config(self.verifier, data, self.servers, folder, epochs=2, validate_every=5)
        config["stream"] |= stream
        return Run(folder, config)

    def command(self, folder: Path, *more: str, **stream: Any) -> list[str]:
        folder.mkdir(exist_ok=True)
        path = folder / "run.json"
        path.write_text(json.dumps(self.run(folder, folder / "data", **stream).config))
        options = [
            "--states",
            str(folder / "states"),
            "--answer-tokens",
            str(ANSWER),
            "--max-tokens",
            "40",
            "--validation-fraction",
            FRACTION,
            *more,
        ]
        return ["answer", str(self.source), "--config", str(path), *options]

    def start(self, folder: Path, *more: str, **stream: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "dflash_scale.commands.cli", *self.command(folder, *more, **stream)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, text=True, cwd=REPO, env=environment)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    folder = tmp_path_factory.mktemp("inputs")
    verifier = tiny_verifier(folder / "verifier")
    draw = np.random.default_rng(3)
    lines = [json.dumps({"prompt_ids": draw.integers(1, VOCAB - 3, 3 + i % 30).tolist()}) for i in range(PROMPTS)]
    lines.insert(7, json.dumps({"prompt_ids": [1] * 39}))
    lines.insert(9, "{broken")
    source = folder / "prompts.jsonl"
    source.write_text("\n".join(lines))
    with embedded_fleet(verifier) as servers:
        yield Inputs(folder, verifier, source, servers)


@pytest.fixture(scope="module")
def answered(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answered")
    process = inputs.start(folder)
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "of 62 lines 2 invalid or not answered" in said
    return folder


def contents(folder: Path) -> tuple[str, dict[int, list[list[int]]]]:
    """Fingerprint of the data set, and of every sample its tokens and the bytes of its states."""
    prepared = load_prepared(folder / "data")
    samples = Samples(prepared.train, prepared.validation)
    names = {path.name for path in (folder / "states").iterdir()}
    assert names == {"manifest.json", "unanswered.jsonl", *(f"hs_{n}.safetensors" for n in range(len(samples.lengths)))}
    tensors = {n: load_file(folder / "states" / f"hs_{n}.safetensors") for n in range(len(samples.lengths))}
    for n, tensor in tensors.items():
        assert tensor["token_ids"].tolist() == samples.tokens(n).tolist()
    return prepared.fingerprint, {n: tensor["hidden_states"].tolist() for n, tensor in tensors.items()}


def test_answers_are_the_verifiers_and_states_are_of_prompt_and_answer(inputs: Inputs, answered: Path) -> None:
    prepared = load_prepared(answered / "data")
    counts, bad = prepared.manifest["counts"], prepared.manifest["bad_lines"]
    assert counts["train"] + counts["validation"] == PROMPTS and counts["validation"] > 0
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in bad] == ["8", "10"]
    assert "the prompt has 39 tokens, wanted 1 to 38" in bad[0] and "not valid JSON" in bad[1]
    assert (prepared.manifest["answer_tokens"], prepared.manifest["temperature"]) == (ANSWER, 0.0)
    model = AutoModelForCausalLM.from_pretrained(inputs.verifier, dtype="float32").eval()
    reference = TransformersVerifier(str(inputs.verifier), AUX_LAYERS, "float32")
    prompts = {tuple(json.loads(line)["prompt_ids"]) for line in inputs.source.read_text().split("\n") if "ids" in line}
    samples = Samples(prepared.train, prepared.validation)
    for number, split in enumerate([prepared.train] * counts["train"] + [prepared.validation] * counts["validation"]):
        mask = split.loss_mask(number - counts["train"] * (split is prepared.validation))
        tokens, start = samples.tokens(number).tolist(), int(np.argmax(mask))
        assert mask.tolist() == [False] * start + [True] * (len(tokens) - start)
        prompt = tokens[:start]
        assert tuple(prompt) in prompts
        prompts.discard(tuple(prompt))
        given = torch.tensor([prompt])
        want = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=min(ANSWER, 40 - start), do_sample=False
        )
        assert tokens == want[0].tolist()
        states = load_file(answered / "states" / f"hs_{number}.safetensors")["hidden_states"]
        expected, _ = reference.run(tokens[:-1], 1, True, reference.layout.layer_ids)
        torch.testing.assert_close(states[:-1], expected, rtol=1e-4, atol=1e-4)
        assert not states[-1].any()
    assert len(prompts) == 1, "that of 39 tokens alone has no answer"


def test_what_is_trained_on_them_is_what_online_trains(inputs: Inputs, answered: Path, tmp_path: Path) -> None:
    """To rounding: an answer's states come from steps of one token, an online run's from one forward. And it shows that
    the zeros of an answer's last token are never seen."""
    offline = train(inputs.run(tmp_path / "offline", answered / "data", mode="offline", cache=str(answered / "states")))
    online = train(inputs.run(tmp_path / "online", answered / "data"))
    assert len(offline) == len(online) > 0
    for ours, theirs in zip(offline, online, strict=True):
        assert ours.keys() == theirs.keys() and ours["kind"] == theirs["kind"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_goes_on_where_it_was(inputs: Inputs, answered: Path, tmp_path: Path, number: signal.Signals) -> None:
    process, work = inputs.start(tmp_path, requests_per_server=1), tmp_path / "states" / ".answering"
    wait_for(lambda: len(list(work.glob("hs_*"))) >= 10 or process.poll() is not None, 120, "ten files")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-9 if number is signal.SIGKILL else 143), errors
    assert not (tmp_path / "data").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("hs_*")}
    (tmp_path / "data").mkdir()
    other = inputs.start(tmp_path)
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 2 and f"{tmp_path / 'data'} exists, wanted a new folder" in errors
    (tmp_path / "data").rmdir()
    other = inputs.start(tmp_path, "--temperature", "0.5")
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 2 and "unfinished start with other prompts or options" in errors
    assert {path.name: path.stat().st_mtime_ns for path in work.glob("hs_*")} == kept
    process = inputs.start(tmp_path)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert contents(tmp_path) == contents(answered)
    times = sorted(path.stat().st_mtime_ns for path in (tmp_path / "states").glob("hs_*"))
    assert set(kept.values()) <= set(times), "answers that were there were asked for again"


def test_without_any_answer_nothing_is_written(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The prompt has more tokens than the verifier has positions."""
    command = inputs.command(tmp_path, "--max-tokens", "600")
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"prompt_ids": [3] * 550}))
    assert cli.main([command[0], str(source), *command[2:]]) == 2
    said = capfd.readouterr().err
    assert "none of 1 prompts has an answer to train on, 1 got none at all; the first: " in said and "HTTP 400" in said
    assert not (tmp_path / "data").exists() and not list((tmp_path / "states").glob("hs_*"))


def test_a_death_at_any_step_of_the_placing_is_mended_by_the_next_start(
    inputs: Inputs, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one in the middle of the files, and then at each of the last steps in turn, as if killed there."""

    class Killed(BaseException):
        pass

    left = [0]

    def dying(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= threading.current_thread() is threading.main_thread()  # not the writer of the files
            if left[0] == 0:
                left[0] = -1
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(answer.os, name, dying(getattr(os, name)))
    monkeypatch.setattr(answer.shutil, "copyfile", dying(answer.shutil.copyfile))
    monkeypatch.chdir(REPO)
    command, deaths = inputs.command(tmp_path), 0
    for calls in (3, 30, *range(1, 100)):
        left[0] = calls
        try:
            assert cli.main(command) == 0
            break
        except Killed:
            deaths += 1
    assert 10 < deaths < 100
    assert contents(tmp_path) == contents(answered)
    assert cli.main(command) == 2, "what is there must not be written over"
