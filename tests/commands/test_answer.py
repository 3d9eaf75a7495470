"""The command `answer` up to its first request; whole runs: tests/e2e/test_own_answers.py."""

import fcntl
import json
from pathlib import Path

import pytest

from dflash_scale.commands.cli import main
from dflash_scale.server.process import free_port
from tests.support.chats import chat, save_tokenizer
from tests.support.command import run_cli


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No weights."""
    folder = tmp_path_factory.mktemp("verifier")
    save_tokenizer(folder)
    shape = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "float32", **shape}))
    return folder


def command(verifier: Path, tmp_path: Path, *more: str, lines: str = chat("a?"), **stream: object) -> list[str]:
    config, source = tmp_path / "run.json", tmp_path / "prompts.jsonl"
    source.write_text(lines)
    servers = [{"http": f"http://127.0.0.1:{free_port()}", "zmq": f"tcp://127.0.0.1:{free_port()}"}]
    content = {"verifier": {"model": str(verifier)}, "data": {"path": str(tmp_path / "data")}}
    config.write_text(json.dumps(content | {"stream": {"servers": servers, "no_server_timeout_s": 0.3} | stream}))
    return ["answer", str(source), "--config", str(config), *more]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "got no folder for the hidden states; give --states DIR, or stream.cache"),
        (["--states", "S", "--answer-tokens", "1"], "got --answer-tokens 1, --max-tokens 3072"),
        (["--states", "S", "--temperature", "nan"], "--temperature nan, wanted at least 2, at least 3 and a number"),
        (["--states", "S", "--temperature", "inf"], "--temperature inf, wanted"),
        (["--states", "S", "--validation-fraction", "1"], "got validation_fraction 1.0, wanted 0 to below 1"),
        (["--states", "S", "--set", "stream.transport=fp8"], 'stream.transport: got "fp8"'),
        (["--states", "S", "--max-tokens", "20"], "prompts.jsonl: no line has a prompt"),
    ],
)
def test_what_cannot_be_ordered(
    verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    more = [str(tmp_path / "states") if word == "S" else word for word in more]
    assert main(command(verifier, tmp_path, *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "states").exists() and not (tmp_path / "data").exists()


def test_a_verifier_that_is_nowhere_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "nowhere", tmp_path, "--states", str(tmp_path / "states"))) == 2
    said = capsys.readouterr().err
    assert said.startswith("dflash-scale answer: model '") and "hf auth login" in said and said.count("\n") == 1


@pytest.mark.parametrize(("out", "states"), [("a", "a"), ("a", "a/states"), ("a/data", "a"), ("a/../b", "b/s")])
def test_one_folder_in_the_other_is_refused(
    verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, states: str
) -> None:
    arguments = command(verifier, tmp_path, "--out", str(tmp_path / out), "--states", str(tmp_path / states))
    assert main(arguments) == 2
    assert "wanted two folders beside each other" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_two_starts_at_once_are_refused(verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "states" / ".answering"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(command(verifier, tmp_path, "--states", str(tmp_path / "states"))) == 2
    assert f"another start of this command works in {work}" in capsys.readouterr().err


def test_credit_for_the_longest_answer_is_checked_first(
    verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(verifier, tmp_path, "--states", str(tmp_path / "states"), server_credit_bytes=100_000)
    assert main(arguments) == 2
    assert "stream.server_credit_bytes: got 100000, wanted at least" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data", "states"])
def test_nothing_is_written_over(verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    assert main(command(verifier, tmp_path, "--states", str(tmp_path / "states"))) == 2
    assert f"{tmp_path / name} exists, wanted a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / name).iterdir()] == ["mine"]


def test_no_server_ends_it_with_what_is_answered(verifier: Path, tmp_path: Path) -> None:
    lines = "\n".join([chat("a?"), chat("b?", "no"), "{"])
    said = run_cli(*command(verifier, tmp_path, "--states", str(tmp_path / "states"), lines=lines))
    assert said.returncode == 1
    assert "no server has been healthy for 0.3 s" in said.stderr
    assert "0 of 2 prompts are answered; start it again to go on" in said.stderr
    assert not (tmp_path / "data").exists()
