import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dflash_scale import __version__
from dflash_scale.commands import cli, doctor
from dflash_scale.data.dataset import load_prepared
from dflash_scale.drafter.pretrained import FORMATS
from tests.support.chats import chat, save_tokenizer
from tests.support.command import ROOT, run_cli

TRAIN = str(ROOT / "launch" / "train.py")


def test_train_goes_through_the_launcher_with_this_interpreter() -> None:
    given = ["--num_gpus", "2", "--config", "c.json", "--set", "train.lr=1e-3", "--resume", "--master_port=29501"]
    assert cli.program("train", given) == [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *("--num_gpus", "2", "--master_port", "29501"),
        TRAIN,
        *("--config", "c.json", "--set", "train.lr=1e-3", "--resume"),
    ]


def test_the_launcher_would_take_these_arguments(tmp_path: Path) -> None:
    runner = importlib.import_module("deepspeed.launcher.runner")
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1")
    given = ["--hostfile", str(hosts), "--include", "a:0", "--num_nodes", "1", "--master_addr", "x", "--no_ssh"]
    given += ["--node_rank", "0", "--config", "c.json"]
    command = cli.program("train", given)
    parsed = runner.parse_args(command[command.index("deepspeed.launcher.runner") + 1 :])
    assert (parsed.user_script, parsed.user_args) == (TRAIN, ["--config", "c.json"])
    assert (parsed.hostfile, parsed.include, parsed.num_nodes, parsed.master_addr) == (str(hosts), "a:0", 1, "x")
    assert (parsed.no_ssh, parsed.node_rank) == (True, 0)


def test_a_missing_hostfile_is_no_run_on_one_node(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--hostfile: got .*hosts, wanted a file"):
        cli.program("train", ["--hostfile", str(tmp_path / "hosts"), "--config", "c.json"])


def test_a_plan_needs_no_launcher() -> None:
    assert cli.program("train", ["--config", "c", "--plan"]) == [sys.executable, TRAIN, "--config", "c", "--plan"]
    done = run_cli("train", "--config", str(ROOT / "configs" / "zero2_dflash.json"), "--plan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Run on 8 ranks")


def test_serve_starts_vllm_or_the_embedded_server() -> None:
    script = str(ROOT / "launch" / "serve_vllm.py")
    assert cli.program("serve", ["m", "--port", "1"]) == [sys.executable, script, "m", "--port", "1"]
    done = run_cli("serve", "--http", "127.0.0.1:0", "--embedded", "--zmq", "z", "--layer-ids", "1", "--model", "/no")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("dflash-scale serve --embedded: --model must be a folder")


def test_a_missing_launch_folder_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(cli.SCRIPTS, "demo", tmp_path / "main.py")
    with pytest.raises(ValueError, match="wanted the launch/ folder of a checkout"):
        cli.program("demo", [])


def test_prepare_writes_a_data_set_and_says_what_became_of_it(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "tokenizer")
    source = tmp_path / "in.jsonl"
    source.write_text(chat("q", "answer") + "\n{bad\n")
    options = ("--workers", "1", "--validation-fraction", "0")
    done = run_cli("prepare", str(source), "--model", model, "--out", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    assert "1 samples to train on" in done.stdout and "of 2 lines 1 invalid" in done.stdout
    assert f"skipped {source}:2: not valid JSON" in done.stderr
    assert len(load_prepared(tmp_path / "out").train) == 1


@pytest.mark.parametrize("command", ["export", "evaluate"])
def test_commands_of_other_modules_get_their_arguments(command: str) -> None:
    done = run_cli(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "--verifier" in done.stdout


def test_reading_options_imports_nothing_heavy() -> None:
    look = "from dflash_scale.commands import cli; import sys; cli.make_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "deepspeed", "numpy", "zmq", "msgpack"}
    assert not heavy & set(done.stdout.split())


def test_every_command_has_its_module() -> None:
    for command in cli.COMMANDS.keys() - cli.SCRIPTS.keys():
        assert callable(importlib.import_module(f"dflash_scale.commands.{command.replace(' --', '_')}").run)


def test_options_of_export_and_evaluate() -> None:
    parse = cli.make_parser().parse_args
    for form in FORMATS:
        assert parse(["export", "step", "out", "--format", form]).format == form
    args = parse(["evaluate", "--verifier", "v", "--drafter", "d", "--prompts", "p", "--", "--dtype", "float32"])
    assert args.vllm_flags == ["--dtype", "float32"]


def test_the_version() -> None:
    assert run_cli("--version").stdout == f"dflash-scale {__version__}\n"


def test_a_users_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["prepare", str(tmp_path / "absent.jsonl"), "--model", "x", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("dflash-scale prepare: ") and "absent.jsonl, wanted a JSONL file" in error
    assert "Traceback" not in error


def test_an_unknown_command_names_the_known() -> None:
    done = run_cli("tarin")
    assert done.returncode == 2
    assert all(command in done.stderr for command in cli.COMMANDS)


def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--shm-bytes", "1"])
    text = capsys.readouterr().out
    assert status == 0, text
    assert "This machine can train." in text
    for name in ("torch", "deepspeed", "_ring", "_kernels, CPU part", "_kernels, CUDA part", "nvcc", "vLLM", "ninja"):
        assert name in text


def test_doctor_gives_status_1_and_a_remedy_for_what_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "torch", ((99, 0), "everything"))
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", ((1, 2), "a test"))
    assert cli.main(["doctor", "--shm-bytes", str(1 << 60)]) == 1
    text = capsys.readouterr().out
    assert "-> pip install -U 'torch>=99.0'" in text
    assert "MISSING  no-such-package" in text and "-> pip install 'no-such-package>=1.2'" in text
    assert "--shm-size" in text
    assert "This machine cannot train: 3 required thing(s) missing." in text


def test_doctor_does_not_require_vllm_here() -> None:
    check = doctor.vllm("/no/such/python")
    assert (check.ok, check.required, check.found) == (False, False, "not in /no/such/python")


def test_doctor_reads_versions_without_importing(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{shutil.which('sh')}\necho 0.32.0\n")
    fake.chmod(0o755)
    assert doctor.vllm(str(fake)).found == f"0.32.0 in {fake}"
    assert doctor.version_tuple("2.13.0+cpu") == (2, 13, 0)
    assert doctor.version_tuple("2.14.0a1") == (2, 14)


@pytest.mark.parametrize(("capability", "ok"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_doctor_knows_which_gpus_the_kernels_run_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], ok: bool
) -> None:
    """On GPUs newer than all machine codes too: they compile the PTX."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check = doctor.gpu()
    assert (check.ok, check.found) == (ok, f"4 × a GPU, sm_{capability[0]}{capability[1]}")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_prepare_with_a_model_that_is_nowhere(workers: str, tmp_path: Path) -> None:
    """One line and no folder, however many processes tokenise: none of them is started."""
    source = tmp_path / "chats.jsonl"
    source.write_text(chat("q", "answer") + "\n")
    out = tmp_path / "out"
    done = run_cli("prepare", str(source), "--model", "nobody/nothing", "--out", str(out), "--workers", workers)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dflash-scale prepare: model 'nobody/nothing': ")
    assert "hf download nobody/nothing" in done.stderr and done.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == [source]
