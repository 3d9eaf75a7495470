"""launch/serve_vllm.py: the command line it builds, and everything that it refuses before vLLM starts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dflash_scale.transport.keys import make_keys
from dflash_scale.verifier.layers import default_layer_ids

SCRIPT = Path(__file__).parents[2] / "launch" / "serve_vllm.py"
ZMQ = "tcp://127.0.0.1:5601"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_vllm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_vllm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


serve_vllm = load()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    return tmp_path


def command(model: Path, *extra: str, gpu: bool = False, **changes: Any) -> list[str]:
    fields = {"model": str(model), "port": 8001, "zmq": ZMQ, "extra": extra, **changes}
    return list(serve_vllm.build_command(serve_vllm.Serving(**fields), gpu=gpu))


def value(command: list[str], flag: str) -> Any:
    return json.loads(command[command.index(flag) + 1])


def test_extraction_command(model: Path) -> None:
    line = command(model, "--max-model-len", "512", layer_ids=(2, 4), python="/opt/vllm/bin/python")
    assert line[:5] == ["/opt/vllm/bin/python", "-m", serve_vllm.SERVER_MODULE, "--model", str(model)]
    assert value(line, "--speculative-config") == {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 12]}},
    }
    transfer = value(line, "--kv-transfer-config")
    assert transfer["kv_connector_extra_config"] == {"zmq": ZMQ, "insecure": False}
    source = SCRIPT.parents[1] / (transfer["kv_connector_module_path"].replace(".", "/") + ".py")
    assert f"class {transfer['kv_connector']}(" in source.read_text()
    assert "--no-enable-prefix-caching" in line
    assert line[-2:] == ["--max-model-len", "512"]


def test_the_pools_size_reaches_the_connector(model: Path) -> None:
    line = ["MODEL", "--port", "1", "--zmq", ZMQ, "--pool-bytes", "4096"]
    assert serve_vllm.parse(line).pool_bytes == 4096
    transfer = value(command(model, pool_bytes=4096), "--kv-transfer-config")
    assert transfer["kv_connector_extra_config"] == {"zmq": ZMQ, "insecure": False, "pool_bytes": 4096}
    with pytest.raises(ValueError, match="--pool-bytes must be above 0, got 0"):
        command(model, pool_bytes=0)
    with pytest.raises(ValueError, match="give one or the other"):
        serve_vllm.parse(["MODEL", "--port", "1", "--drafter", "DIR", "--pool-bytes", "4096"])


def test_eager_only_on_a_cpu_and_only_by_default(model: Path) -> None:
    assert "--enforce-eager" in command(model)
    assert "--enforce-eager" not in command(model, gpu=True)
    assert "--enforce-eager" not in command(model, "--no-enforce-eager")


def test_default_layer_ids_reach_the_command(model: Path) -> None:
    config = value(command(model), "--speculative-config")
    ids = config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    assert ids == [*default_layer_ids(12), 12]


def test_layers_of_a_multimodal_config(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 6}}))
    config = value(command(model, layer_ids=(5,)), "--speculative-config")
    assert config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [5, 6]


def test_drafter_command(model: Path, tmp_path: Path) -> None:
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    (drafter / "config.json").write_text(json.dumps({"block_size": 8}))
    line = command(model, drafter=drafter, zmq=None)
    assert value(line, "--speculative-config") == {
        "method": "dflash",
        "model": str(drafter),
        "num_speculative_tokens": 7,
    }
    assert "--kv-transfer-config" not in line
    assert "--no-enable-prefix-caching" not in line


@pytest.mark.parametrize("content", [{}, {"block_size": 1}, {"block_size": "8"}, {"block_size": True}])
def test_drafters_without_a_block_size(model: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    (drafter / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="block_size"):
        command(model, drafter=drafter, zmq=None)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--enable-prefix-caching"], "cached prefix"),
        (["--enable_prefix_caching"], "cached prefix"),
        (["--speculative-config", "{}"], "derived from"),
        (["--speculative-config={}"], "derived from"),
        (["--speculative_config.method=ngram"], "derived from"),
        (["-sc", "{}"], "derived from"),
        (["--kv-transfer-config", "{}"], "connector"),
        (["--kv-transfer-config.kv_role=kv_both"], "connector"),
        (["--pipeline-parallel-size", "2"], "see all layers"),
        (["--pipeline_parallel_size=2"], "see all layers"),
        (["-pp", "2"], "see all layers"),
        (["--data-parallel-size", "2", "--data-parallel-size-local", "1"], "several machines"),
        (["--data_parallel_rank=1"], "several machines"),
        (["-dp", "2", "-dpn", "1"], "several machines"),
        (["--data-parallel-hybrid-lb"], "several machines"),
        (["-dp", "2", "--nnodes", "2"], "several machines"),
        (["--data-parallel-size", "two"], "must be a number from 1 on, got 'two'"),
        (["--data-parallel-size", "0"], "must be a number from 1 on, got '0'"),
        (["--data-parallel-size"], "must be a number from 1 on, got ''"),
        (["--data-parallel-size", "59936"], "wanted a port from 1 to 5600"),
        (["--model", "other"], "first argument"),
        (["--port", "1"], "before the --"),
        (["--host=0.0.0.0"], "before the --"),
    ],
)
def test_flags_of_vllm_that_cannot_work(model: Path, extra: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        command(model, *extra)


@pytest.mark.parametrize("extra", [("--data-parallel-size", "2"), ("--data_parallel_size=2",), ("-dp", "2")])
def test_the_connector_is_told_how_many_engines_there_are(model: Path, extra: tuple[str, ...]) -> None:
    line = command(model, *extra)
    assert line[-len(extra) :] == list(extra)
    config = value(line, "--kv-transfer-config")["kv_connector_extra_config"]
    assert config == {"zmq": ZMQ, "insecure": False, "engines": 2}
    with pytest.raises(ValueError, match="each engine of a data-parallel server binds a port of its own"):
        command(model, *extra, zmq="tcp://127.0.0.1:*")


def test_harmless_parallel_flags(model: Path) -> None:
    config = value(command(model, "-dp", "1", "--nnodes", "2"), "--kv-transfer-config")["kv_connector_extra_config"]
    assert config == {"zmq": ZMQ, "insecure": False}
    assert command(model, "-pp", "1", "--tensor-parallel-size", "2")[-4:] == ["-pp", "1", "--tensor-parallel-size", "2"]


@pytest.mark.parametrize("ids", [(), (2, 2), (4, 2), (-1, 2), (12,), (2, 13)])
def test_layer_ids_that_cannot_work(model: Path, ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending order from 0"):
        command(model, layer_ids=ids)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5601", "tcp://*:5601", "tcp://10.1.2.3:5601"])
def test_open_addresses(model: Path, address: str) -> None:
    with pytest.raises(ValueError, match="--insecure"):
        command(model, zmq=address)
    extra = value(command(model, zmq=address, insecure=True), "--kv-transfer-config")["kv_connector_extra_config"]
    assert extra == {"zmq": address, "insecure": True}


def test_keys_open_the_wire_but_not_http(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(tmp_path / "keys")
    monkeypatch.chdir(tmp_path)
    serving = serve_vllm.parse(["m", "--port", "1", "--zmq", "tcp://*:1", "--keys", "keys"])
    config = value(command(model, zmq=serving.zmq, keys=serving.keys), "--kv-transfer-config")
    assert config["kv_connector_extra_config"] == {
        "zmq": "tcp://*:1",
        "insecure": False,
        "keys": str(tmp_path / "keys"),  # absolute: vLLM's workers may have another working directory
    }
    with pytest.raises(ValueError, match="HTTP has neither encryption nor keys"):
        command(model, keys=serving.keys, host="0.0.0.0")
    with pytest.raises(ValueError, match=r"server\.secret cannot be read"):
        command(model, keys=tmp_path / "nowhere")


def test_open_http_host(model: Path) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        with pytest.raises(ValueError, match="--insecure"):
            command(model, host=host)
    assert command(model, host="::1")[6] == "::1"


def test_missing_zmq_and_unknown_models(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--zmq is missing"):
        command(model, zmq=None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="download it first"):
        command(Path("some/model"))
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="download it first"):
        command(Path("some/model"))  # vLLM would take the branch main, which is not here
    assert "--kv-transfer-config" in command(Path("some/model"), "--revision", "abc")
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert "--kv-transfer-config" in command(Path("some/model"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_hidden_layers": "4"}'])
def test_configs_that_say_nothing(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config"):
        command(model)


def test_environment() -> None:
    root = str(SCRIPT.parents[1])
    cpu = serve_vllm.build_environment({"PYTHONPATH": "/a", "OMP_NUM_THREADS": "3"}, gpu=False)
    assert cpu["PYTHONPATH"] == f"{root}{os.pathsep}/a"
    assert cpu["OMP_NUM_THREADS"] == "3", "the user's own value wins"
    assert cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert serve_vllm.build_environment({}, gpu=True) == {"PYTHONPATH": root}


def test_parse() -> None:
    got = serve_vllm.parse(
        ["m", "--port", "8001", "--zmq", ZMQ, "--layer-ids", "2,4", "--python", "/p", "--", "--max-num-seqs", "4"]
    )
    want = serve_vllm.Serving("m", 8001, ZMQ, (2, 4), python="/p", extra=("--max-num-seqs", "4"))
    assert got == want
    with pytest.raises(ValueError, match="look like 2,4,6"):
        serve_vllm.parse(["m", "--port", "1", "--layer-ids", "2,x"])
    with pytest.raises(ValueError, match="one or the other"):
        serve_vllm.parse(["m", "--port", "1", "--drafter", "d", "--zmq", ZMQ])


def test_the_script_refuses_with_one_line(model: Path) -> None:
    line = [sys.executable, str(SCRIPT), str(model), "--port", "8001", "--zmq", "tcp://*:1"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("dflash-scale serve: --zmq: got 'tcp://*:1', wanted a loopback address")
    assert done.stderr.count("\n") == 1


def test_the_script_becomes_vllm(model: Path, tmp_path: Path) -> None:
    """exec: the process that was started is the one that the interpreter of --python runs in."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0  # is vLLM there?\necho "$$ $OMP_NUM_THREADS $@"\nexit 7\n')
    fake.chmod(0o755)
    line = [sys.executable, str(SCRIPT), str(model), "--port", "8001", "--zmq", ZMQ, "--python", str(fake)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert out.splitlines()[-1].startswith(f"{process.pid} 1 -m {serve_vllm.SERVER_MODULE} --model {model}")


def test_an_interpreter_without_vllm_is_refused(model: Path) -> None:
    line = [sys.executable, str(SCRIPT), str(model), "--port", "8001", "--zmq", ZMQ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    missing = f"{sys.executable} has no vLLM: give the Python of vLLM's own environment with --python."
    assert done.stderr == f"dflash-scale serve: {missing}\n"


def test_one_process_on_a_cpu_unless_told_otherwise(model: Path) -> None:
    line = command(model)
    assert line[line.index("--distributed-executor-backend") + 1] == "uni"
    assert "uni" not in command(model, gpu=True)
    assert "uni" not in command(model, "--tensor-parallel-size", "2")


def test_imports_nothing_heavy() -> None:
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program, str(SCRIPT)], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "deepspeed", "transformers", "vllm", "pydantic"}
