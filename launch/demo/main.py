"""The main job in small, end to end on one machine: `make demo`, or with real vLLM servers `make demo VLLM=1`.

    1 verifier   trains a small verifier on the standard library's sources (once; kept in .cache/)
    2 answers    lets it answer prompts cut from those sources, and prepares the data set
    3 servers    starts two extraction servers
    4 training   deepspeed launch/train.py --config configs/demo.json, two ranks (or one GPU), ZeRO-2, over ZeroMQ
    5 export     writes the folder that vLLM serves
    6 evaluation drafts on held-out prompts, in Transformers and, with --vllm, in a real vLLM

Only processes started here are ended here, by their ids.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # started as a script

from dflash_scale.commands import edge  # noqa: E402
from dflash_scale.config.run import Config, load_config  # noqa: E402
from dflash_scale.data.prepare import prepare  # noqa: E402
from dflash_scale.evaluation.evaluate import EvaluateSpec, Evaluation, evaluate, report_lines  # noqa: E402
from dflash_scale.files import new_folder  # noqa: E402
from dflash_scale.receiver.status import read_status  # noqa: E402
from dflash_scale.server.process import end_with_parent, free_port, stop, wait_until_ready  # noqa: E402
from dflash_scale.training.export import export_checkpoint, named_checkpoint  # noqa: E402
from dflash_scale.verifier.layers import aux_layers  # noqa: E402
from dflash_scale.verifier.shape import verifier_shape  # noqa: E402
from launch.demo.answers import AnswerSpec, make_answers  # noqa: E402
from launch.demo.plots import plot_acceptance, plot_training  # noqa: E402
from launch.demo.verifier import STEPS, make_verifier  # noqa: E402

SERVERS = 2
EVALUATED = 32  # held-out prompts, at most
ANSWER_TOKENS = 96  # to each of them, at most
RANKS = min(2, torch.cuda.device_count() or 2)
# A vLLM server on a CPU takes what it is given; the demo's samples are short and its machine is small.
VLLM_FLAGS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager")


@dataclass(frozen=True)
class Demo:
    """One demo: its folder, its engine ("transformers" or "vllm") and its size."""

    out: Path
    cache: Path
    config: Path
    vllm_python: str | None
    verifier_steps: int
    prompts: int
    overrides: tuple[str, ...] = ()  # section.key=value, of the run's configuration

    @property
    def engine(self) -> str:
        return "vllm" if self.vllm_python else "transformers"


class Stages:
    """Announces stages and keeps their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        print(f"\n[{len(self.seconds) + 1}/6] {name}: {what}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


@dataclass(frozen=True)
class Server:
    """One running extraction server."""

    process: "subprocess.Popen[bytes]"
    http: str
    zmq: str
    log: Path


def start_server(demo: Demo, config: Config, number: int) -> Server:
    http, zmq = free_port(), f"tcp://127.0.0.1:{free_port()}"
    model = config.verifier.model
    layer_ids = ",".join(map(str, aux_layers(config.verifier.layer_ids, verifier_shape(model).layers)))
    if demo.vllm_python:
        command = [sys.executable, str(REPO / "launch" / "serve_vllm.py"), model, "--port", str(http), "--zmq", zmq]
        command += ["--layer-ids", layer_ids, "--python", demo.vllm_python, "--", *VLLM_FLAGS]
    else:
        command = [sys.executable, "-m", "dflash_scale.commands.cli", "serve", "--embedded", "--model", model]
        command += ["--zmq", zmq, "--http", f"127.0.0.1:{http}", "--layer-ids", layer_ids]
    log = demo.out / "logs" / f"server-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=REPO,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    return Server(process, f"http://127.0.0.1:{http}", zmq, log)


@contextmanager
def servers(demo: Demo, config: Config) -> Iterator[list[Server]]:
    """The fleet, ready; it is gone when the block is left."""
    with ExitStack() as stack:
        fleet = []
        for number in range(SERVERS):
            fleet.append(start_server(demo, config, number))
            stack.callback(stop, fleet[-1].process)
        for server in fleet:
            wait_until_ready(server.process, server.http, server.log)
        yield fleet


def train(demo: Demo, overrides: list[str], fleet: list[Server]) -> None:
    addresses = json.dumps([{"http": s.http, "zmq": s.zmq} for s in fleet])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", f"--num_accelerators={RANKS}"]
    command += [f"--master_port={free_port()}", str(REPO / "launch" / "train.py"), "--config", str(demo.config)]
    for override in [*overrides, f"stream.servers={addresses}"]:
        command += ["--set", override]
    done = subprocess.run(command, cwd=REPO, check=False, preexec_fn=end_with_parent)
    if done.returncode:
        raise RuntimeError(f"training ended with status {done.returncode}; its messages stand above")


def conversations(demo: Demo, verifier: Path) -> tuple[Path, Path]:
    """The verifier's answers to held-in and held-out prompts, made once per verifier."""
    folder = verifier.with_name(f"{verifier.name}-answers-{demo.prompts}")
    held_in, held_out = folder / "held-in.jsonl", folder / "held-out.jsonl"
    if not folder.exists():
        with new_folder(folder) as aside:
            make_answers(verifier, aside / held_in.name, aside / held_out.name, AnswerSpec(prompts=demo.prompts))
    return held_in, held_out


def summary(demo: Demo, result: Evaluation, seconds: dict[str, float]) -> dict[str, object]:
    best = result.vllm or result.speculative
    totals = json.loads((demo.out / "train" / "totals.json").read_text())
    status = read_status(next((demo.out / "train" / "stream").glob("*-rank0.json")))
    assert status is not None, "found a moment ago"
    return {
        "engine": demo.engine,
        "acceptance_length": best.length,
        "acceptance_length_transformers": result.speculative.length,
        "acceptance_length_untrained": result.untrained.length,
        "acceptance_by_position": best.rates,
        "acceptance_replay_gap_points": best.gap(result.replay),
        "acceptance_length_uniform_anchors": result.uniform.length,
        "outputs_equal": result.equal if result.vllm_equal is None else min(result.equal, result.vllm_equal),
        "samples_issued": status.issued - status.retried,
        "samples_trained": totals["trained"],
        "samples_validated": totals["validated"],
        "samples_quarantined": totals["quarantined"],
        "seconds": seconds,
    }


def replace_folder(out: Path) -> None:
    """Removes an earlier demo's folder and makes a new one.

    Raises:
        ValueError: the folder holds something that no demo wrote.
    """
    mark = out / ".demo"
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise ValueError(f"--out {out} holds something else than a demo, which would be removed; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mark.touch()


def run(demo: Demo) -> dict[str, object]:
    stages = Stages()
    replace_folder(demo.out)
    with stages.stage("verifier", f"a small one, trained for {demo.verifier_steps} steps unless it is in {demo.cache}"):
        verifier = make_verifier(demo.cache / f"verifier-{demo.verifier_steps}", demo.verifier_steps)
    with stages.stage("answers", f"{demo.prompts} by the verifier itself"):
        held_in, held_out = conversations(demo, verifier)
        prepare([held_in], str(verifier), demo.out / "data", validation_fraction=0.03)
    overrides = [
        f"verifier.model={verifier}",
        f"data.path={demo.out / 'data'}",
        f"train.output_dir={demo.out / 'train'}",
        *demo.overrides,
    ]
    config = load_config(demo.config, overrides)
    with ExitStack() as stack:
        with stages.stage("servers", f"{SERVERS} x {demo.engine}"):
            fleet = stack.enter_context(servers(demo, config))
        with stages.stage("training", f"{RANKS} ranks; metrics in {demo.out / 'train' / 'metrics.jsonl'}"):
            train(demo, overrides, fleet)
    with stages.stage("export", str(demo.out / "drafter")):
        drafter = export_checkpoint(named_checkpoint(demo.out / "train"), demo.out / "drafter")
    with stages.stage("evaluation", f"{EVALUATED} held-out prompts"):
        result = evaluate(
            EvaluateSpec(
                str(verifier),
                drafter,
                held_out,
                EVALUATED,
                ANSWER_TOKENS,
                demo.vllm_python,
                VLLM_FLAGS if demo.vllm_python else (),
                demo.out / "logs" / "vllm-drafter.log",
            )
        )
    (demo.out / "evaluation.json").write_text(result.dump())
    plot_training(demo.out / "train" / "metrics.jsonl", demo.out / "training.png")
    shares = {"untrained": result.untrained.rates, "trained, Transformers": result.speculative.rates}
    if result.vllm is not None:
        shares["trained, vLLM"] = result.vllm.rates
    plot_acceptance({name: list(rates) for name, rates in shares.items()}, demo.out / "acceptance.png")
    content = summary(demo, result, stages.seconds)
    (demo.out / "summary.json").write_text(json.dumps(content, indent=2))
    print(f"\n{report_lines(result)}")
    return content


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dflash-scale demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", action="store_true", help="real vLLM servers ($DFLASH_SCALE_VLLM_PYTHON)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder; replaced; default %(default)s")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="made once; default %(default)s")
    parser.add_argument("--config", type=Path, default=REPO / "configs" / "demo.json")
    parser.add_argument(
        "--verifier-steps", type=int, default=STEPS, help="training steps of the verifier; default %(default)s"
    )
    parser.add_argument("--prompts", type=int, default=1920, help="conversations to train on; default %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    args = parser.parse_args()
    python = os.environ.get("DFLASH_SCALE_VLLM_PYTHON", str(REPO / ".venv-vllm" / "bin" / "python"))
    if args.vllm and not Path(python).is_file():
        return edge.fail("demo", f"no vLLM at {python}: run `make setup`, or set DFLASH_SCALE_VLLM_PYTHON")
    vllm = python if args.vllm else None
    sizes = (args.verifier_steps, args.prompts)
    demo = Demo(args.out, args.cache, args.config, vllm, *sizes, overrides=tuple(args.set))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(edge.STOPPED))  # so that what was started is ended
    try:
        content = run(demo)
    except ValueError as error:
        return edge.fail("demo", error)
    minutes = sum(content["seconds"].values()) / 60  # type: ignore[attr-defined]
    print(
        f"\n{content['samples_issued']:,} samples issued: {content['samples_trained']:,} trained, "
        f"{content['samples_validated']:,} validated, {content['samples_quarantined']:,} quarantined · "
        f"{minutes:.1f} minutes\n\n"
        f"drafter  {demo.out / 'drafter'}\nmetrics  {demo.out / 'train' / 'metrics.jsonl'}\n"
        f"plots    {demo.out / 'training.png'}  {demo.out / 'acceptance.png'}\nsummary  {demo.out / 'summary.json'}"
    )
    return edge.DONE


if __name__ == "__main__":
    sys.exit(main())
