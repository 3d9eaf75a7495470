"""`dflash-scale COMMAND`: one name for the programs of the project; each command only finds and starts its program.

prepare    conversations -> a prepared data set
serve      a vLLM server that sends hidden states (`--embedded`: a small verifier in Transformers, without vLLM)
keys       the keys of the wire between servers and receivers
train      `deepspeed launch/train.py ...`; with --plan, print what the run resolves to and exit
generate   hidden states of a data set -> a cache on disk, for the modes offline and hybrid
answer     prompts -> the verifier's own answers as a data set, and their hidden states as a cache
export     a checkpoint -> a folder that `vllm serve` takes
evaluate   acceptance of an exported drafter; with --vllm-python, also in a real vLLM server
demo       the whole way on one machine, with a tiny verifier
doctor     what this machine lacks for which feature, and what to do about it
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = {"serve": LAUNCH / "serve_vllm.py", "train": LAUNCH / "train.py", "demo": LAUNCH / "demo" / "main.py"}
COMMANDS = ("prepare", "serve", "keys", "train", "generate", "answer", "export", "evaluate", "demo", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Mistakes of the user are one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="dflash-scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(arguments[:1]).command
    rest = arguments[1:]
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        if command in SCRIPTS:
            return start(program(command, rest))
        if command == "prepare":
            return prepare(rest)
        rooms = {"keys": "transport", "evaluate": "evaluation", "export": "training"}
        room = f"dflash_scale.{rooms.get(command, 'commands')}"
        return int(importlib.import_module(f"{room}.{command}").main(rest))
    except ValueError as error:
        print(f"dflash-scale {command}: {error}", file=sys.stderr)
        return 2


def program(command: str, rest: list[str]) -> list[str]:
    """The command line of a program in launch/; raises ValueError where the folder is missing."""
    if command == "serve" and "--embedded" in rest:
        return [
            sys.executable,
            "-m",
            "dflash_scale.server.transformers_server",
            *(word for word in rest if word != "--embedded"),
        ]
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


def prepare(arguments: Sequence[str]) -> int:
    """The command `prepare`."""
    parser = argparse.ArgumentParser(
        prog="dflash-scale prepare", description="Tokenises conversations into a prepared data set."
    )
    parser.add_argument("sources", nargs="+", help="JSONL files, or folders of them")
    parser.add_argument("--model", required=True, help="folder or hub id of the verifier, for its tokenizer")
    parser.add_argument("--out", required=True, help="folder to write; data.path of the configuration")
    parser.add_argument("--validation-fraction", type=float, default=0.01, help="share of conversations held out")
    parser.add_argument("--max-tokens", type=int, default=3072, help="samples are cut to this length, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    args = parser.parse_args(arguments)
    from dflash_scale.data import prepare

    manifest = prepare.prepare(
        args.sources,
        args.model,
        args.out,
        validation_fraction=args.validation_fraction,
        max_tokens=args.max_tokens,
        seed=args.seed,
        workers=args.workers,
    )
    counts, tokens = manifest["counts"], manifest["tokens"]
    print(
        f"{args.out}: {counts['train']:,} samples to train on ({tokens['train']:,} tokens), {counts['validation']:,} "
        f"held out; of {counts['lines']:,} lines {counts['bad']:,} bad, {counts['untrainable']:,} without anything to "
        f"train on, {counts['truncated']:,} cut"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
