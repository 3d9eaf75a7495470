"""Time and peak extra memory of the loss, forward and backward, beside its GEMMs alone and beside its peers.

    python benchmarks/bench_loss.py [--device cuda] [--kernel auto] [--json FILE]

gemms    the products that no loss can do without, in the same chunks: logits, the verifier's where wanted, and dX
loss     dflash_scale.training.loss.drafter_loss
full     all logits at once, torch's own losses and autograd: F.cross_entropy, F.kl_div
liger    Liger's fused linear cross entropy, and its fused linear JSD for kl (with beta 0 it is the KL divergence), if
         it is installed

8192 slots x 4096 x 151936 in bfloat16 on a GPU, 1024 x 1024 x 32768 in float32 on a CPU. Each is measured in a process
of its own: extra memory is the peak of its first round less what its inputs hold (allocated on a GPU, resident on a
CPU), time the best of the rounds after it, which all take in turn. Blocks start every 8 tokens, so that in `kl` two
slots share a position of the verifier; peers have no such notion and get a row of its logits, or states, per slot.
"""

import argparse
import contextlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:  # started as a script
    sys.path.insert(0, str(REPO))

from benchmarks.machine import stamp  # noqa: E402
from benchmarks.timing import synchronize  # noqa: E402
from dflash_scale.drafter.heads import OutputHead  # noqa: E402
from dflash_scale.ops.softmax_loss import term_weights  # noqa: E402
from dflash_scale.training.loss import LossInputs, LossSpec, VerifierStates, drafter_loss, kept_slots, trained_mask  # noqa: E402

TERMS = {name: term_weights({name: 1.0}) for name in ("ce", "kl")}
MOST_EXTRA_BYTES, MOST_TIMES_GEMMS = 0.6e9, 1.15  # the targets, on a GPU and everywhere
BLOCK, STRIDE = 17, 8  # slots of a block, 16 of them trained; tokens from one anchor to the next


@dataclass(frozen=True)
class Problem:
    slots: int
    hidden: int
    vocabulary: int
    dtype: str
    device: str
    kernel: str
    rounds: int


@dataclass(frozen=True)
class Figure:
    seconds: float
    extra_bytes: int


@dataclass(frozen=True)
class Inputs:
    """hidden (N, H) · head, other (V, H) · labels (A, S) · verifier with states (T, H)."""

    hidden: Tensor
    head: Tensor
    other: Tensor
    labels: Tensor
    trained: np.ndarray[Any, Any]
    verifier: VerifierStates

    @classmethod
    def make(cls, problem: Problem) -> "Inputs":
        dtype, device = getattr(torch, problem.dtype), problem.device
        torch.manual_seed(0)
        blocks = problem.slots // (BLOCK - 1)
        anchors = (np.arange(blocks) * STRIDE).astype(np.int32)
        trained = trained_mask(np.full(blocks, BLOCK - 1, np.int32), BLOCK)
        bound = problem.hidden**-0.5
        head, other = (
            torch.empty(problem.vocabulary, problem.hidden, dtype=dtype, device=device).uniform_(-bound, bound)
            for _ in range(2)
        )
        hidden = torch.randn(problem.slots, problem.hidden, dtype=dtype, device=device)
        states = torch.randn(int(anchors[-1]) + BLOCK, problem.hidden, dtype=dtype, device=device)
        labels = torch.randint(0, problem.vocabulary, (blocks, BLOCK), dtype=torch.int32, device=device)
        verifier = VerifierStates(states, anchors, lambda x: x @ other.T)
        return cls(hidden.requires_grad_(), head, other, labels, trained, verifier)

    def flat_labels(self) -> Tensor:
        return self.labels.flatten()[torch.from_numpy(kept_slots(self.trained)).to(self.labels.device)].long()

    def slot_states(self) -> Tensor:
        """(N, H) the verifier's state that each slot predicts from."""
        block, slot = np.nonzero(self.trained)
        return self.verifier.states[torch.from_numpy(self.verifier.anchors[block] + slot).to(self.labels.device)]


Round = Callable[[], object]


def gemms(inputs: Inputs, problem: Problem, term: str) -> Round:
    spec = LossSpec(terms=TERMS[term])
    verifier = inputs.verifier if spec.soft else None
    job = LossInputs(OutputHead(inputs.head), inputs.labels, inputs.trained, spec, verifier)

    def products() -> None:
        grad = torch.empty_like(inputs.hidden)
        with torch.no_grad():
            for chunk in job.chunks():
                logits = inputs.hidden[chunk.rows] @ inputs.head.T
                if verifier is not None:
                    job.verifier_logits(chunk)
                torch.mm(logits, inputs.head, out=grad[chunk.rows])

    return products


def loss(inputs: Inputs, problem: Problem, term: str) -> Round:
    spec = LossSpec(terms=TERMS[term], gamma=1e9, kernel=problem.kernel)
    scale = torch.tensor(1 / problem.slots, device=problem.device)
    verifier, head = inputs.verifier if spec.soft else None, OutputHead(inputs.head)

    def step() -> None:
        value, _ = drafter_loss(inputs.hidden, head, inputs.labels, inputs.trained, spec, scale, verifier)
        torch.autograd.grad(value, inputs.hidden)

    return step


def full(inputs: Inputs, problem: Problem, term: str) -> Round:
    labels, states = inputs.flat_labels(), inputs.slot_states()

    def step() -> None:
        logits = inputs.hidden @ inputs.head.T
        if term == "ce":
            value = F.cross_entropy(logits, labels)
        else:
            with torch.no_grad():
                target = (states @ inputs.other.T).log_softmax(1)
            value = F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
        torch.autograd.grad(value, inputs.hidden)

    return step


def liger(inputs: Inputs, problem: Problem, term: str) -> Round:
    # Only here and by name: it is a peer, and no dependency.
    name = "fused_linear_cross_entropy" if term == "ce" else "fused_linear_jsd"
    module = importlib.import_module(f"liger_kernel.transformers.{name}")
    labels, states = inputs.flat_labels(), inputs.slot_states()
    if term == "ce":
        linear_ce = module.LigerFusedLinearCrossEntropyLoss()
        return lambda: torch.autograd.grad(linear_ce(inputs.head, inputs.hidden, labels), inputs.hidden)
    linear_jsd = module.LigerFusedLinearJSD(jsd_beta=0.0)
    weights = (inputs.head, states, inputs.other)
    return lambda: torch.autograd.grad(linear_jsd(inputs.hidden, *weights), inputs.hidden)


CANDIDATES = {"gemms": gemms, "loss": loss, "full": full, "liger": liger}


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return peak_bytes(device)


def serve(problem: Problem, candidate: str, term: str, pipe: Connection) -> None:
    """One candidate, in a process of its own: sends its extra memory, then the seconds of each round asked for."""
    inputs = Inputs.make(problem)
    step = CANDIDATES[candidate](inputs, problem, term)
    warm = torch.ones(64, 64, device=problem.device)
    warm @ warm  # the libraries' own memory
    before = held_bytes(problem.device)
    step()
    synchronize(problem.device)
    pipe.send(peak_bytes(problem.device) - before)
    while pipe.recv():
        started = time.perf_counter()
        step()
        synchronize(problem.device)
        pipe.send(time.perf_counter() - started)


def compare(problem: Problem, names: list[str], term: str) -> dict[str, Figure | None]:
    """A figure for each candidate, None where it failed, for example because memory was short. They take their rounds
    in turn, so that a busy moment of the machine meets all."""
    spawn = get_context("spawn")
    pipes: dict[str, Connection] = {}
    extra: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processes = []
    for name in names:
        pipes[name], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(problem, name, term, theirs)))
        processes[-1].start()
        theirs.close()
        with contextlib.suppress(EOFError):
            extra[name] = pipes[name].recv()
    for turn in range(problem.rounds + 1):
        for name in extra:
            pipes[name].send(turn < problem.rounds)
            if turn < problem.rounds:
                seconds[name].append(pipes[name].recv())
    for process in processes:
        process.join()
    return {name: Figure(min(seconds[name]), extra[name]) if name in extra else None for name in names}


def report(figures: dict[str, dict[str, Figure | None]], problem: Problem) -> list[str]:
    """The table, and a line per target."""
    lines = [f"{'':12}{'ms':>10}{'of gemms':>10}{'extra GB':>10}"]
    targets = []
    for term, row in figures.items():
        base, ours = row["gemms"], row["loss"]
        for name, figure in row.items():
            if figure is None or base is None:
                lines.append(f"{term + ' ' + name:12}    failed")
                continue
            share = figure.seconds / base.seconds
            lines.append(
                f"{term + ' ' + name:12}{figure.seconds * 1e3:10.1f}{share:10.2f}{figure.extra_bytes / 1e9:10.2f}"
            )
            if ours is not None and name not in ("gemms", "loss"):
                targets.append((f"{term}: faster than {name}", ours.seconds < figure.seconds))
        if ours is not None and base is not None:
            share = ours.seconds / base.seconds
            targets.append((f"{term}: at most {MOST_TIMES_GEMMS} x the GEMMs ({share:.2f})", share <= MOST_TIMES_GEMMS))
            if problem.device == "cuda":
                held = f"{term}: at most {MOST_EXTRA_BYTES / 1e9} GB extra ({ours.extra_bytes / 1e9:.2f})"
                targets.append((held, ours.extra_bytes <= MOST_EXTRA_BYTES))
    return lines + [f"{'met   ' if met else 'MISSED'}  {text}" for text, met in targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, choices=["cuda", "cpu"])
    parser.add_argument("--kernel", default="auto", choices=["auto", "cuda", "cpu", "torch"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    shape = (8192, 4096, 151936, "bfloat16") if args.device == "cuda" else (1024, 1024, 32768, "float32")
    problem = Problem(*shape, args.device, args.kernel, args.rounds)
    has_liger = args.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    machine = stamp(["liger_kernel"] if has_liger else [], args.device)
    names = [name for name in CANDIDATES if name != "liger" or has_liger]
    figures = {term: compare(problem, names, term) for term in TERMS}
    print(f"{problem.slots} slots x {problem.hidden} x {problem.vocabulary} {problem.dtype}, {machine['device']}")
    print("\n".join(report(figures, problem)))
    if args.json:
        rows = {
            term: {name: figure and asdict(figure) for name, figure in row.items()} for term, row in figures.items()
        }
        result = {**machine, "problem": asdict(problem), "figures": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
