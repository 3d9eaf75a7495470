"""`dflash-scale COMMAND`: every option of the commands, which do their work in modules of their own.

A command's module is imported when its options are read, so that `--help` takes no time. What a module's `run` takes is
the options, what it gives is the exit status (edge.py). Three commands are programs in launch/, which read their own.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dflash_scale import __version__
from dflash_scale.commands import edge
from dflash_scale.transport.layout import DTYPE_BYTES

Add = Callable[..., argparse.Action]  # a parser's `add_argument`
LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = {"serve": LAUNCH / "serve_vllm.py", "train": LAUNCH / "train.py", "demo": LAUNCH / "demo" / "main.py"}
EMBEDDED = "serve --embedded"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Mistakes of the user are one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"] and "--embedded" in arguments:
        arguments = [EMBEDDED, *(word for word in arguments[1:] if word != "--embedded")]
    command = arguments[0] if arguments else ""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        if command in SCRIPTS:
            return start(program(command, arguments[1:]))
        args = make_parser().parse_args(arguments)
        module = command.replace(" --", "_")
        return int(importlib.import_module(f"dflash_scale.commands.{module}").run(args))
    except ValueError as error:
        return edge.fail(command, error)


def program(command: str, rest: list[str]) -> list[str]:
    """The command line of a program in launch/; raises ValueError where the folder is missing."""
    script = SCRIPTS[command]
    if not script.is_file():
        raise ValueError(
            f"got no {script}, wanted the launch/ folder of a checkout beside the package; clone the repository and "
            "install it with `pip install -e .`"
        )
    if command != "train" or {"--plan", "-h", "--help"} & set(rest):
        return [sys.executable, str(script), *rest]
    launcher, ours = launcher_arguments(rest)
    # The runner by its module, not by the name `deepspeed`: it then starts the ranks with this very interpreter.
    return [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, str(script), *ours]


def launcher_arguments(rest: list[str]) -> tuple[list[str], list[str]]:
    """Splits train's arguments into those of the deepspeed launcher and those of launch/train.py.

    Raises ValueError for a --hostfile that is not there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ["hostfile", "include", "exclude", "num_nodes", "num_gpus", "num_accelerators"]
    names += ["node_rank", "master_addr", "master_port", "launcher", "launcher_args", "ssh_port"]
    for name in names:
        parser.add_argument(f"--{name}", dest=name)
    parser.add_argument("--no_ssh", action="store_true")
    known, ours = parser.parse_known_args(rest)
    if known.hostfile is not None and not Path(known.hostfile).is_file():
        raise ValueError(
            f"--hostfile: got {known.hostfile}, wanted a file with a line `NAME slots=GPUS` for each node; write it, "
            "or drop the option to train on this node alone"
        )
    launcher = [word for name in names if (value := getattr(known, name)) for word in (f"--{name}", value)]
    return [*launcher, *(["--no_ssh"] if known.no_ssh else [])], ours


def start(command: list[str]) -> int:
    """Becomes the program, so that signals and the exit status are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def make_parser() -> argparse.ArgumentParser:
    """Of all commands; those of launch/ stand in it for its help."""
    parser = argparse.ArgumentParser(prog="dflash-scale", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dflash-scale {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (text, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=name != EMBEDDED)
        if add_options is not None:
            add_options(command.add_argument)
    return parser


def _prepare(add: Add) -> None:
    add("sources", nargs="+", help="JSONL files, or folders of them")
    add("--model", required=True, help="folder or hub id of the verifier, for its tokenizer")
    add("--out", required=True, help="folder to write; data.path of the configuration")
    _split(add)
    add("--max-tokens", type=int, default=3072, help="longer samples are truncated; default %(default)s")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise; default %(default)s")


def _embedded(add: Add) -> None:
    add("--model", required=True, help="folder of a Transformers causal LM")
    add("--http", required=True, help="HOST:PORT to answer completions at")
    add("--zmq", required=True, help="tcp://HOST:PORT to send hidden states from")
    add("--layer-ids", required=True, help="comma-separated aux layers, id k = after k decoder layers")
    add("--dtype", default="auto", choices=["auto", *DTYPE_BYTES], help="dtype of the verifier; default %(default)s")
    add("--threads", type=int, default=1, help="threads of torch; more make small models slower; default %(default)s")
    add("--insecure", action="store_true", help="allow addresses that other machines can reach")
    add("--keys", type=Path, help="folder of `dflash-scale keys`: serve only receivers named there")
    held = "hidden states held for receivers, at most; default 8 GiB"
    add("--max-unsent-bytes", type=int, default=argparse.SUPPRESS, help=held)  # the server's own default


def _keys(add: Add) -> None:
    add("folder", type=Path, help="folder to write; existing keys are never written over")


def _generate(add: Add) -> None:
    _run(add)
    add("--out", help="folder to write; default: stream.cache")


def _answer(add: Add) -> None:
    add("sources", nargs="+", help="JSONL files, or folders of them; answers in them are left out")
    _run(add)
    add("--out", help="folder of the data set; default: data.path")
    add("--states", help="folder of the hidden states; default: stream.cache")
    add("--answer-tokens", type=int, default=1024, help="longest answer, in tokens; default %(default)s")
    add("--max-tokens", type=int, default=3072, help="longest sample, prompt and answer; default %(default)s")
    add("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy; default %(default)s")
    _split(add)


def _run(add: Add) -> None:
    add("--config", required=True, type=Path, help="JSON file of the run: verifier and servers")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")


def _split(add: Add) -> None:
    add("--validation-fraction", type=float, default=0.01, help="share for validation; default %(default)s")
    add("--seed", type=int, default=0, help="seed of the split into training and validation; default %(default)s")


def _export(add: Add) -> None:
    add("checkpoint", type=Path, help="step folder; a run's folder means its best checkpoint")
    add("out_dir", type=Path, help="folder to make")
    add("--verifier", help="folder or hub id, if it is not where the run had it")
    forms = ["speculators", "zlab"]
    add("--format", choices=forms, default=forms[0], help="format of config.json; vLLM reads both; default %(default)s")


def _evaluate(add: Add) -> None:
    add("--verifier", required=True, help="folder or hub id")
    add("--drafter", required=True, type=Path, help="exported folder")
    add("--prompts", required=True, type=Path, help="JSONL with prompt_ids, or a prepared folder")
    add("--count", type=int, default=64, help="number of prompts, at most; default %(default)s")
    add("--max-new-tokens", type=int, default=256, help="longest answer; default %(default)s")
    add("--vllm-python", help="interpreter that has vLLM, to measure there too")
    add("--out", type=Path, help="file for the results, JSON")
    add("--device", default="cpu", help="torch device of the Transformers verifier; default %(default)s")
    add("vllm_flags", nargs="*", help="flags for vLLM, after --")


def _doctor(add: Add) -> None:
    add("--vllm-python", default=sys.executable, help="the Python that has vLLM; default: this one")
    add(
        "--shm-bytes",
        type=int,
        default=1 << 30,
        help="shared memory to ask for: ring_bytes × ranks of this node; default %(default)s",
    )


# What `dflash-scale --help` says of each, and its options where they are read here.
COMMANDS: dict[str, tuple[str, Callable[[Add], None] | None]] = {
    "prepare": ("conversations -> a prepared data set", _prepare),
    "serve": ("a vLLM server that sends hidden states, or that serves a drafter", None),
    EMBEDDED: ("a small verifier in Transformers, without vLLM", _embedded),
    "keys": ("the keys of the wire between servers and receivers", _keys),
    "train": ("`deepspeed launch/train.py ...`; with --plan, print what the run resolves to and exit", None),
    "generate": ("hidden states of a data set -> a cache on disk, for the modes offline and hybrid", _generate),
    "answer": ("prompts -> the verifier's own answers as a data set, and their hidden states as a cache", _answer),
    "export": ("a checkpoint -> a folder that `vllm serve` takes", _export),
    "evaluate": ("acceptance of an exported drafter; with --vllm-python, also in a real vLLM server", _evaluate),
    "demo": ("the whole way on one machine, with a tiny verifier", None),
    "doctor": ("what this machine lacks for which feature, and what to do about it", _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
