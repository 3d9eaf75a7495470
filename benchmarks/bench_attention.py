"""How long the attention takes beside FlexAttention and torch's own attention, and how much memory.

    python benchmarks/bench_attention.py [--case NAME] [--backend NAME] [--skip NAME] [--block-mask] [--out FILE]

sm90, sm80, cpu   this library's kernels, where the machine runs them
flex by plan      this library's "flex": FlexAttention, compiled, its block lists made from the plan
flex              FlexAttention as other trainers of such drafters use it: context and blocks in one tensor, block lists
                  by a compiled create_block_mask from the whole mask function
sdpa              scaled_dot_product_attention with a dense mask, keys and values repeated for each query head

Times are medians of forward and backward taken in turn; on a GPU by its own events. TFLOP/s count what the mask lets
through, 4 D per pair of query row and key forward and 2.5 times that backward, for all of them alike. Memory is the
peak of a forward and backward beyond their inputs; extra memory is that without the output and the gradients, which all
of them have. The roofline is the larger one of arithmetic and of moving each tensor once.

This library's kernels have their turn in all cases before anything is compiled: a compilation may take minutes, that of
create_block_mask most of all, which is timed in the end and only with --block-mask.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script it must find its neighbour and this checkout's package
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask  # noqa: E402

from benchmarks.attention_problems import (  # noqa: E402
    CPU_PROBLEMS,
    GPU_PROBLEMS,
    KERNELS,
    OURS,
    Attend,
    Problem,
    implementations,
    mask_function,
)
from benchmarks.machine import stamp  # noqa: E402
from benchmarks.timing import WARM_UP, between, limits, mark, wall  # noqa: E402
from dflash_scale.ops.attention_plan import Plan, build_plan  # noqa: E402

Firsts = dict[str, Tensor]  # each case's first output, on the CPU, which the others are held to
PEERS = ("flex", "sdpa")
COLUMNS = {"fwd ms": 11, "bwd ms": 11, "both ms": 11, "TFLOP/s": 9, "bwd": 9, "roof": 8, " bwd": 8, "MB": 9, "extra": 9}


@dataclass
class Times:
    """Medians in seconds."""

    forward: float
    backward: float
    both: float


def measure(attend: Attend, tensors: tuple[Tensor, ...], repeats: int) -> tuple[Times, Tensor]:
    """The times, and the output for comparison."""
    dout = torch.randn_like(tensors[0])
    cuda, warm_up = dout.is_cuda, WARM_UP[dout.device.type]
    turns: list[tuple[Any, Any, Any]] = []
    for turn in range(repeats + warm_up):
        if cuda and turn == warm_up:
            torch.cuda.synchronize()
            torch.cuda._sleep(200_000_000)  # a tenth of a second: the host gets ahead, and what is timed has no gaps
        begin = mark(cuda)
        out = attend(*tensors)
        middle = mark(cuda)
        torch.autograd.grad(out, tensors, dout)
        turns.append((begin, middle, mark(cuda)))
    if cuda:
        torch.cuda.synchronize()

    def median(first: int, last: int) -> float:
        return statistics.median(between(turn[first], turn[last]) for turn in turns[warm_up:])

    return Times(median(0, 1), median(1, 2), median(0, 2)), out.detach()


def peak_cuda(attend: Attend, tensors: tuple[Tensor, ...]) -> int:
    dout = torch.randn_like(tensors[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(attend(*tensors), tensors, dout)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(problem: Problem, name: str) -> int:
    """In a process of its own, whose largest resident size is set back after the inputs are there."""
    with get_context("spawn").Pool(1) as pool:
        return int(pool.apply(_peak_of_process, (problem, name)))


def _peak_of_process(problem: Problem, name: str) -> int:
    small = Problem("warm", 256, 1, 8, problem.block, dtype=problem.dtype)
    for each in (small, problem):  # the small one loads code and starts threads
        plan, tensors = each.plan("cpu"), each.tensors("cpu")
        dout = torch.randn_like(tensors[0])
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and is kept would serve without being seen
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        attend = implementations(each, plan, tensors)[name]()
        torch.autograd.grad(attend(*tensors), tensors, dout)
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def plan_times(problem: Problem, device: str, repeats: int) -> dict[str, float]:
    """Seconds to make the plan."""
    plan = problem.plan(device)

    def build() -> Plan:
        return build_plan(plan.anchors, plan.doc_ids, block_size=plan.block_size, window=plan.window, group=plan.group)

    times = {"plan": wall(build, repeats, device)}
    if device == "cuda":
        # Without the host's part: many launches replayed as one graph.
        graph, launches = torch.cuda.CUDAGraph(), 50
        with torch.cuda.graph(graph):
            for _ in range(launches):
                build()
        times["plan, GPU alone"] = wall(graph.replay, repeats, device) / launches
    return times


def mask_times(problem: Problem, device: str, repeats: int) -> dict[str, float]:
    """Seconds to make FlexAttention's block lists from the mask function."""
    plan, rows = problem.plan(device), problem.anchors * problem.block
    make: Callable[..., Any] = torch.compile(create_block_mask) if device == "cuda" else create_block_mask
    where = str(plan.anchors.device)  # "cuda" and "cuda:0" would be compiled apart
    seconds = wall(lambda: make(mask_function(plan), 1, 1, rows, problem.tokens + rows, where), repeats, device)
    return {"create_block_mask": seconds}


def bench(problem: Problem, device: str, repeats: int, names: list[str], firsts: Firsts) -> Iterator[dict[str, Any]]:
    """A row for each implementation that is named and that the machine runs."""
    plan, tensors = problem.plan(device), problem.tensors(device)
    flop, moved = problem.flop(plan), problem.bytes_moved(tensors)
    arithmetic, bandwidth = limits(device, tensors[0].dtype)
    floor = [max(f / arithmetic, b / bandwidth) for f, b in zip(flop, moved, strict=True)]
    for name, make in implementations(problem, plan, tensors).items():
        if name not in names:
            continue
        row: dict[str, Any] = {"case": problem.name, "implementation": name}
        try:
            attend = make()
            times, out = measure(attend, tensors, repeats)
            peak = peak_cuda(attend, tensors) if device == "cuda" else peak_cpu(problem, name)
        except Exception as error:  # noqa: BLE001  whatever one of them fails with, the others have their turn
            row["skipped"] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{problem.name:<26}{name:<14} skipped, {row['skipped']}", flush=True)
            yield row
            continue
        first = firsts.setdefault(problem.name, out.cpu()).to(device)
        difference = ((out - first).float().norm() / first.float().norm()).item()
        row |= {"off_by": difference, "agrees": difference < 0.02}
        if not row["agrees"]:
            print(f"{name} and the first of {problem.name} compute different things: {difference:.3f}", flush=True)
        row |= {f"{part}_s": value for part, value in asdict(times).items()}
        row |= {"forward_tflops": flop[0] / times.forward / 1e12, "backward_tflops": flop[1] / times.backward / 1e12}
        row |= {"forward_of_roofline": floor[0] / times.forward, "backward_of_roofline": floor[1] / times.backward}
        # The output and the gradients are in the peak whatever the implementation.
        results = (sum(x.numel() for x in tensors) + out.numel()) * out.element_size()
        row |= {"peak_bytes": peak, "extra_bytes": max(0, peak - results)}
        print_row(row)
        del attend, out, first
        gc.collect()
        yield row


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What went wrong. Too little memory is a result of its own."""
    found = []
    for row in rows:
        what = f"{row['case']}: {row['implementation']}"
        if "skipped" in row and not row["skipped"].startswith("OutOfMemoryError"):
            found.append(f"{what}: {row['skipped']}")
        elif "off_by" in row and not row["agrees"]:
            found.append(f"{what} and the first one differ by {row['off_by']:.3f}")
    return found


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:<26}{row['implementation']:<14}"
        + "".join(f"{row[f'{part}_s'] * 1e3:>11.3f}" for part in ("forward", "backward", "both"))
        + f"{row['forward_tflops']:>9.3g}{row['backward_tflops']:>9.3g}"
        + f"{row['forward_of_roofline']:>8.0%}{row['backward_of_roofline']:>8.0%}{row['peak_bytes'] / 1e6:>9.1f}"
        + f"{row['extra_bytes'] / 1e6:>9.1f}",
        flush=True,
    )


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster this library's fastest is than each peer, forward and backward together, and the memory."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        done = {row["implementation"]: row for row in rows if row["case"] == case and row.get("agrees")}
        best = min((row for name, row in done.items() if name in OURS), key=lambda row: row["both_s"], default=None)
        if best is None:
            continue
        for peer in ("flex", "flex by plan", "sdpa"):
            if peer in done and peer != best["implementation"]:
                ratio = {"case": case, "of": best["implementation"], "to": peer}
                ratio["speed"] = done[peer]["both_s"] / best["both_s"]
                ratio["memory"] = best["extra_bytes"] / max(1, done[peer]["extra_bytes"])
                found.append(ratio)
    return found


def targets(rows: list[dict[str, Any]], plans: dict[str, dict[str, float]], device: str) -> list[dict[str, Any]]:
    """What the kernels are meant to reach (the GPU's on an H100), and what they reached here."""
    times = {(ratio["case"], ratio["to"]): ratio for ratio in ratios(rows)}
    found: list[dict[str, Any]] = []

    def wanted(what: str, most: bool, limit: float, got: float | None) -> None:
        met = None if got is None else got <= limit if most else got >= limit
        found.append({"target": what, "wanted": limit, "at": "most" if most else "least", "got": got, "met": met})

    if device == "cpu":
        for problem in CPU_PROBLEMS:
            if problem.tokens == 4096 and (ratio := times.get((problem.name, "sdpa"))) is not None:
                wanted(f"{problem.name}: times faster than sdpa", False, 3.0, ratio["speed"])
                wanted(f"{problem.name}: share of the extra memory of sdpa", True, 0.1, ratio["memory"])
        return found
    kernels = [
        row
        for row in rows
        if row["case"] == "1 document" and row["implementation"] in ("sm90", "sm80") and row.get("agrees")
    ]
    for part, limit in (("forward", 500.0), ("backward", 380.0)):
        reached = max((row[f"{part}_tflops"] for row in kernels), default=None)
        wanted(f"1 document: {part} TFLOP/s", False, limit, reached)
    for name, limit in (("1 document", 1.5), ("4 documents", 2.0), ("12 documents", 2.0)):
        ratio = times.get((name, "flex"))
        mine = ratio is not None and ratio["of"] in ("sm90", "sm80")
        wanted(f"{name}: times faster than flex", False, limit, ratio["speed"] if ratio is not None and mine else None)
    for name, plan in plans.items():
        wanted(f"{name}: seconds of the plan's kernel", True, 20e-6, plan.get("plan, GPU alone"))
    return found


@dataclass
class Report:
    """What is known so far, in the file `out` as soon as it is known: a machine that is lent may go at any moment."""

    device: str
    out: Path | None
    result: dict[str, Any]
    faults: list[str] = field(default_factory=list)  # those that are not an implementation's

    def write(self) -> None:
        rows, plans = self.result["results"], self.result["plans"]
        self.result["failures"] = self.faults + failures(rows)
        self.result["ratios"] = ratios(rows)
        self.result["targets"] = targets(rows, plans, self.device)
        if self.out is not None:
            self.out.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        self.result["results"].append(row)
        self.write()

    def time(self, what: Callable[[Problem, str, int], dict[str, float]], problem: Problem, repeats: int) -> None:
        """Times that belong to a case and to no implementation."""
        try:
            self.result["plans"].setdefault(problem.name, {}).update(what(problem, self.device, repeats))
        except Exception as error:  # noqa: BLE001  the rest is timed all the same, and the run fails in the end
            self.faults.append(f"{problem.name}: {what.__name__}: {type(error).__name__}: {str(error)[:300]}")
        self.write()


def run(report: Report, problems: list[Problem], args: argparse.Namespace) -> None:
    """Our kernels in all cases, then what has to be compiled, then what may take longest."""
    firsts: Firsts = {}
    for kernels in (True, False):
        for problem in problems:
            if kernels:
                report.time(plan_times, problem, args.repeats)
            names = [
                name
                for name in (*OURS, *PEERS)
                if (name in KERNELS) == kernels and args.backend in (None, name) and name not in args.skip
            ]
            for row in bench(problem, report.device, args.repeats, names, firsts) if names else ():
                report.add(row)
    for problem in problems if args.block_mask else []:
        report.time(mask_times, problem, args.repeats)


def print_summary(result: dict[str, Any]) -> None:
    print()
    for name, plan in result["plans"].items():
        print(f"{name:<26}" + ", ".join(f"{what} {seconds * 1e6:.1f} us" for what, seconds in plan.items()))
    print()
    for target in result["targets"]:
        got = "not measured" if target["got"] is None else f"{target['got']:.3g}"
        verdict = {True: "met", False: "NOT met", None: ""}[target["met"]]
        print(f"{target['target']:<60} at {target['at']} {target['wanted']:g}: {got} {verdict}")
    for failure in result["failures"]:
        print(f"FAILED {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = GPU_PROBLEMS if device == "cuda" else CPU_PROBLEMS
    # Masks of other trainers hold numbers that differ from case to case, and each is compiled again.
    torch._dynamo.config.recompile_limit = 64
    parser.add_argument("--case", choices=[problem.name for problem in problems], help="default: all")
    parser.add_argument("--backend", help="one implementation, as named above; default: all")
    parser.add_argument("--skip", action="append", default=[], help="an implementation to leave out")
    parser.add_argument("--block-mask", action="store_true", help="also the time of create_block_mask")
    parser.add_argument("--repeats", type=int, default=30 if device == "cuda" else 3)
    parser.add_argument("--out", type=Path, help="file for the results, rewritten after each of them")
    args = parser.parse_args()
    chosen = [problem for problem in problems if args.case in (None, problem.name)]
    result: dict[str, Any] = {
        **stamp(device=device),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
        "cases": [asdict(problem) for problem in chosen],
        "results": [],
        "plans": {},
    }
    print(f"{result['device']}, torch {torch.__version__}, commit {result['commit']}\n")
    print(" " * 40 + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    run(Report(device, args.out, result), chosen, args)
    print_summary(result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
