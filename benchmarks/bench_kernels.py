"""How long this library's attention kernels take, and nothing else: no peer, and nothing that is compiled first.

    python benchmarks/bench_kernels.py [--case NAME] [--kernel NAME] [--repeats 30] [--out FILE]

The cases of bench_attention.py, in less than half a minute on a GPU. Forward and backward are timed apart, each many
times in a row; then the profiler gives every kernel of theirs its own time, the backward's two among them. TFLOP/s
count what the mask lets through, as there. A large product, timed at the start, says what the device's clock allows
today.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script it must find its neighbour and this checkout's package
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity  # noqa: E402

from benchmarks.attention_problems import CPU_PROBLEMS, GPU_PROBLEMS, KERNELS, Problem  # noqa: E402
from benchmarks.machine import stamp  # noqa: E402
from benchmarks.timing import WARM_UP, between, mark, product_rate, synchronize  # noqa: E402
from dflash_scale.ops import attention  # noqa: E402
from dflash_scale.ops.attention_plan import Plan  # noqa: E402

PROFILED = 3  # turns under the profiler
AHEAD = 50_000_000  # cycles that the GPU sleeps while the host launches what is timed


@dataclass(frozen=True)
class Work:
    """One problem's forward and backward by one kernel, as the operator does them."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]

    @classmethod
    def make(cls, plan: Plan, tensors: tuple[Tensor, ...], kernel: str) -> Work:
        tensors = tuple(x.detach() for x in tensors)
        dout = torch.randn_like(tensors[0])
        indices = (plan.starts, plan.ends, plan.tile_ranges, plan.order, plan.tile_order)
        scale = tensors[0].shape[2] ** -0.5
        options = (plan.block_size, plan.window or 0, plan.causal_block, scale, attention.KERNELS[kernel])
        operators = torch.ops.dflash_scale
        out, lse = operators.anchor_attention(*tensors, *indices, *options)
        return cls(
            lambda: operators.anchor_attention(*tensors, *indices, *options),
            lambda: operators.anchor_attention_backward(dout, *tensors, out, lse, *indices, *options),
        )


def median(work: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one of many in a row."""
    for _ in range(WARM_UP[device]):
        work()
    synchronize(device)
    if device == "cuda":
        torch.cuda._sleep(AHEAD)
    marks = [mark(device == "cuda")]
    for _ in range(repeats):
        work()
        marks.append(mark(device == "cuda"))
    synchronize(device)
    return statistics.median(between(first, last) for first, last in itertools.pairwise(marks))


def apart(work: Work, device: str) -> dict[str, float]:
    """Seconds of each kernel in a forward and backward; on a CPU of the two operators."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        for _ in range(PROFILED):
            work.forward()
            work.backward()
        synchronize(device)
    seconds: dict[str, float] = {}
    for event in found.events():
        if "dflash" in event.name and (event.device_type == DeviceType.CUDA) == (device == "cuda"):
            name = short(event.name)
            seconds[name] = seconds.get(name, 0.0) + event.time_range.elapsed_us() / 1e6 / PROFILED
    return seconds


def short(name: str) -> str:
    """void dflash::gpu::sm90::backward_dq<128, ...>(...) -> backward_dq."""
    return re.split(r"[<(]", name)[0].rpartition("::")[2]


def bench(problem: Problem, kernel: str, repeats: int, device: str) -> dict[str, Any]:
    plan = problem.plan(device)
    work = Work.make(plan, problem.tensors(device), kernel)
    row: dict[str, Any] = {}
    flop = problem.flop(plan)
    for part, what, count in (("forward", work.forward, flop[0]), ("backward", work.backward, flop[1])):
        seconds = median(what, repeats, device)
        row |= {f"{part}_s": seconds, f"{part}_tflops": count / seconds / 1e12}
    # A single turn is for another profiler, such as ncu, beside which torch's gets no counters.
    return row | {"kernels_s": apart(work, device) if repeats > 1 else {}}


def usable(problem: Problem, device: str) -> list[str]:
    plan, tensors = problem.plan(device), problem.tensors(device)
    return [name for name in KERNELS if attention.ATTENTION.backend(name).obstacle(tensors, plan, 1.0) is None]


def print_row(row: dict[str, Any]) -> None:
    line = f"{row['case']:<26}{row['kernel']:<6}"
    if "failed" in row:
        print(f"{line}failed: {row['failed']}", flush=True)
        return
    for part in ("forward", "backward"):
        line += f"  {part} {row[f'{part}_s'] * 1e3:.3f} ms {row[f'{part}_tflops']:.3g} TFLOP/s"
    print(line + "".join(f"  {name} {seconds * 1e3:.3f}" for name, seconds in row["kernels_s"].items()), flush=True)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = GPU_PROBLEMS if device == "cuda" else CPU_PROBLEMS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[problem.name for problem in problems], help="default: all")
    parser.add_argument("--kernel", choices=KERNELS, help="default: all that the machine runs")
    parser.add_argument("--repeats", type=int, default=30 if device == "cuda" else 3)
    parser.add_argument("--out", type=Path, help="file for the results, rewritten after each of them")
    args = parser.parse_args()
    chosen = [problem for problem in problems if args.case in (None, problem.name)]
    rates = {problem.dtype: product_rate(device, getattr(torch, problem.dtype)) for problem in chosen}
    report: dict[str, Any] = {**stamp(device=device), "product_flops": rates, "results": []}
    print(f"{report['device']}, torch {torch.__version__}, commit {report['commit']}; a large product: ", end="")
    print(", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates.items()), flush=True)
    for problem in chosen:
        for kernel in [args.kernel] if args.kernel else usable(problem, device):
            row: dict[str, Any] = {"case": problem.name, "kernel": kernel}
            try:
                row |= bench(problem, kernel, args.repeats, device)
            except Exception as error:  # noqa: BLE001  the others have their turn
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            report["results"].append(row)
            print_row(row)
            if args.out is not None:
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any("failed" in row for row in report["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
