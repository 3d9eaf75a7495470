"""The command `generate` up to its first request, and its progress line; whole runs: tests/e2e/test_offline.py."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dflash_scale.commands.cli import main
from dflash_scale.commands.generate import Progress
from dflash_scale.data.prepare import prepare
from dflash_scale.server.process import free_port
from tests.support.chats import chat, save_tokenizer
from tests.support.command import run_cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, and beside each its verifier; no weights."""
    folder = tmp_path_factory.mktemp("generate")
    shape = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 97}
    source = folder / "in.jsonl"
    source.write_text("".join(chat(f"q{i:02}", "x" * 40) + "\n" for i in range(20)))
    for name in ("one", "other"):
        save_tokenizer(folder / name)
        (folder / name / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "float32", **shape}))
    tokenizer = AutoTokenizer.from_pretrained(folder / "other")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder / "other")
    prepare([source], str(folder / "one"), folder / "data", validation_fraction=0.0)
    return folder


def config(folder: Path, tmp_path: Path, verifier: str = "one", **stream: object) -> str:
    path = tmp_path / "run.json"
    content = {"verifier": {"model": str(folder / verifier)}, "data": {"path": str(folder / "data")}, "stream": stream}
    path.write_text(json.dumps(content))
    return str(path)


def test_somewhere_to_write_and_a_server_are_needed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--config", config(folder, tmp_path)]) == 2
    assert "got no folder to write to; give --out DIR, or stream.cache" in capsys.readouterr().err
    path = config(folder, tmp_path, mode="offline", cache=str(tmp_path / "states"), servers=[])
    assert main(["generate", "--config", path]) == 2
    assert "stream.servers: got none" in capsys.readouterr().err
    path = config(folder, tmp_path, transport="fp8")
    assert main(["generate", "--config", path, "--out", str(tmp_path / "states")]) == 2
    assert 'stream.transport: got "fp8", wanted "exact" or "bf16"' in capsys.readouterr().err
    assert not (tmp_path / "states").exists()


def test_the_data_sets_tokenizer_must_be_the_verifiers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--config", config(folder, tmp_path, "other"), "--out", str(tmp_path / "states")]
    assert main(arguments) == 2
    assert f"was prepared with the tokenizer of {folder / 'one'}" in capsys.readouterr().err
    assert not (tmp_path / "states").exists()


def test_a_watched_file_is_enough_of_a_fleet(folder: Path, tmp_path: Path) -> None:
    server = {"http": f"http://127.0.0.1:{free_port()}", "zmq": f"tcp://127.0.0.1:{free_port()}"}
    (tmp_path / "fleet.json").write_text(json.dumps([server]))
    path = config(folder, tmp_path, servers=[], endpoints_file=str(tmp_path / "fleet.json"), no_server_timeout_s=0.3)
    said = run_cli("generate", "--config", path, "--out", str(tmp_path / "states"))
    assert said.returncode == 1
    assert f"no server has been healthy for 0.3 s ({server['http']}" in said.stderr


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_no_server_ends_it_with_its_totals(folder: Path, tmp_path: Path, mode: str) -> None:
    """In mode offline too, for which the folder is made: the servers are asked, and named."""
    servers = [{"http": f"http://127.0.0.1:{free_port()}", "zmq": f"tcp://127.0.0.1:{free_port()}"}]
    more = {"mode": mode, "cache": str(tmp_path / "states")} if mode == "offline" else {}
    path = config(folder, tmp_path, servers=servers, probe_s=0.1, **more)
    out = tmp_path / "states"
    said = run_cli("generate", "--config", path, "--out", str(out), "--set", "stream.no_server_timeout_s=0.3")
    assert said.returncode == 1
    assert f"no server has been healthy for 0.3 s ({servers[0]['http']}" in said.stderr
    assert "start it again to go on" in said.stderr
    assert "20 samples, 0 present, 0 written (0.00 GB), 0 quarantined" in said.stdout
    totals = json.loads((out / "totals.json").read_text())
    assert totals == {
        "complete": False,
        "samples": 20,
        "present": 0,
        "written": 0,
        "written_bytes": 0,
        "quarantined": 0,
    }
    assert json.loads((out / "manifest.json").read_text())["layout"]["layer_ids"] == [2, 4]


def test_without_a_terminal_a_line_says_every_ten_seconds_how_far_it_is_and_what_limits_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(float(second) for second in range(40))
    monkeypatch.setattr("dflash_scale.commands.generate.time.monotonic", lambda: next(clock))
    progress = Progress(1000)
    for second in range(1, 40):
        status = {"present": 3, "written": 10 * second, "quarantined": second // 20, "written_bytes": 10**9 * second}
        progress.show(status, "servers")
    progress.end()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("| ")[1].split(" [")[0] for line in lines] == ["103/1000", "204/1000", "304/1000"]
    assert "10.00 GB written · bottleneck: servers]" in lines[0]
    assert lines[1].endswith("bottleneck: servers · 1 quarantined]")
