"""How long a whole training step takes, part by part, what it reaches of the device, and what a peer's parts cost.

    python benchmarks/bench_train.py [--case NAME] [--peers] [--engine] [--attention NAME] [--loss NAME] [--out FILE]

A GPU trains a drafter of Qwen3-8B (5 layers, 5 aux, blocks of 16, bf16) on rows of 8192 tokens; a CPU a small one, by
the same code. One row is a micro-step: drafter, loss, backward, its gradients added to fp32 ones; once in `--rows` rows
these are clipped, AdamW steps on fp32 masters and the weights are their copies, as DeepSpeed does it with bf16. Times
are medians, on a GPU by its own events; a row's is that of its parts and its share of the optimizer step.

FLOP are what the definition asks for (train_cases.py), for all variants those of ours; MFU is their rate as a share of
the device's. Idle is the share of a step in which no kernel runs; peak is the allocator's, beside the planner's figure.

--peers swaps in a peer's parts (train_peers.py) one at a time, then all together. All have to give our loss and our
gradients, to rounding. A part's share of the gain is what it alone adds to our time, of what all of them add together;
the shares need not add up to one. Needs torch, transformers, triton and numpy; --engine DeepSpeed and the configuration
as well, the planner's figure the configuration.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script it must find its neighbours and this checkout's package
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

from benchmarks.machine import stamp  # noqa: E402
from benchmarks.timing import limits  # noqa: E402
from benchmarks.train_cases import CPU_CASES, GPU_CASES, Case, Row, make_row, row_flop  # noqa: E402
from benchmarks.train_peers import OURS, PEERS, TOGETHER, Variant  # noqa: E402
from benchmarks.train_step import PARTS, Evidence, Options, Step, measure  # noqa: E402
from dflash_scale.ops.attention import ATTENTION  # noqa: E402

ENGINE = Variant("DeepSpeed engine")
# How far a variant's loss and the norms' gradients may be from ours, relative.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (2e-2, 0.05)}
SHOWN_KERNELS = 12
LEAST_GAIN = 0.02  # of our time: a share of less says nothing


class Disagreement(Exception):
    """A variant computes something else."""


def make_step(case: Case, options: Options, variant: Variant) -> Step:
    if variant is not ENGINE:
        return Step(case, options, variant)
    from benchmarks.train_engine import EngineStep

    return EngineStep(case, options)


def difference(found: Evidence, ours: Evidence) -> tuple[float, float]:
    """Of the loss and of the norms' gradients, relative to ours."""
    loss = (found.loss - ours.loss).abs() / ours.loss.abs()
    return loss.item(), ((found.gradient - ours.gradient).norm() / ours.gradient.norm()).item()


def check(case: Case, found: Evidence, ours: Evidence) -> dict[str, float]:
    """Raises Disagreement beyond TOLERANCE."""
    loss, gradient = difference(found, ours)
    most_loss, most_gradient = TOLERANCE[case.dtype]
    if not (loss <= most_loss and gradient <= most_gradient):
        raise Disagreement(
            f"loss {found.loss.item():.6g} and ours {ours.loss.item():.6g} differ by {loss:.2g}, wanted at most "
            f"{most_loss}; the norms' gradients by {gradient:.2g}, wanted at most {most_gradient}"
        )
    return {"loss_off_by": loss, "gradient_off_by": gradient}


def bench(case: Case, options: Options, variant: Variant, ours: Evidence | None) -> tuple[dict[str, Any], Evidence]:
    step = make_step(case, options, variant)
    try:
        result = measure(step)
        assert step.evidence is not None
        result["loss"] = step.evidence.loss.item()
        if ours is not None:
            result |= check(case, step.evidence, ours)
        return result, step.evidence
    finally:
        step.close()


def attempts(case: Case, options: Options, variants: list[Variant]) -> Iterator[dict[str, Any]]:
    """Each variant's figures, or why it has none: the others have their turn."""
    ours: Evidence | None = None
    for variant in variants:
        row: dict[str, Any] = {"variant": variant.name}
        try:
            result, evidence = bench(case, options, variant, ours)
            row |= result
            ours = evidence if variant is OURS else ours
        except torch.OutOfMemoryError as error:
            row["out_of_memory"] = str(error)[:300]
        except ImportError as error:
            row["left_out"] = f"needs {error.name or error}, which is not installed"
        except Exception as error:  # noqa: BLE001  whatever one of them fails with, the others have their turn
            row["failed"] = f"{type(error).__name__}: {str(error)[:600]}"
        if options.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        yield row


def planned(case: Case, row: Row, options: Options) -> int | str:
    """The planner's figure, or why there is none."""
    try:
        from benchmarks.train_engine import planned_bytes
    except ImportError as error:
        return f"left out: needs {error.name}, which is not installed"
    return planned_bytes(case, row, options)


def describe(case: Case, options: Options, peak: float) -> dict[str, Any]:
    """What is known of a case before it runs."""
    row = make_row(case, options.device)
    return {
        "shapes": asdict(case),
        "anchors": len(row.anchors),
        "slots": row.labels.numel(),
        "trained": len(row.kept),
        "flop": row_flop(case, row),
        "peak_flops": peak,
        "planned_bytes": planned(case, row, options),
        "variants": [],
    }


def compare(entry: dict[str, Any]) -> None:
    """Adds to each variant what it reaches of the device, its ratios to ours, and its share of the gain."""
    done = {row["variant"]: row for row in entry["variants"] if "row_s" in row}
    ours, together = done.get(OURS.name), done.get(TOGETHER.name)
    work = sum(entry["flop"].values())
    for name, row in done.items():
        row["tflops"] = work / row["row_s"] / 1e12
        row["mfu"] = work / row["row_s"] / entry["peak_flops"]
        if name in (OURS.name, ENGINE.name) and "peak_bytes" in row and not isinstance(entry["planned_bytes"], str):
            row["peak_of_planned"] = row["peak_bytes"] / entry["planned_bytes"]
        if ours is None:
            continue
        row["time_ratio"] = row["row_s"] / ours["row_s"]
        if "peak_bytes" in ours and "peak_bytes" in row:
            row["memory_ratio"] = row["peak_bytes"] / ours["peak_bytes"]
        gain = together["row_s"] - ours["row_s"] if together is not None else 0.0
        if gain > LEAST_GAIN * ours["row_s"] and name in {peer.name for peer in PEERS}:
            row["share_of_gain"] = (row["row_s"] - ours["row_s"]) / gain


def print_case(entry: dict[str, Any]) -> None:
    flop = ", ".join(f"{part} {count / 1e12:.3g}" for part, count in entry["flop"].items())
    plan = entry["planned_bytes"]
    print(f"\n{entry['case']}: {entry['anchors']} anchors, {entry['slots']} slots, {entry['trained']} trained")
    print(f"  TFLOP: {flop}; planned memory: {plan if isinstance(plan, str) else f'{plan / 1e9:.3g} GB'}")
    print(f"  {'ms':<18}" + "".join(f"{part:>11}" for part in (*PARTS, "row")) + "   rows/s  tokens/s  TFLOP/s   MFU")


def print_row(row: dict[str, Any]) -> None:
    if "row_s" not in row:
        print(f"  {row['variant']:<18}" + next(f"{key}: {row[key]}" for key in row if key != "variant"), flush=True)
        return
    line = f"  {row['variant']:<18}" + "".join(f"{row['parts_s'][part] * 1e3:11.2f}" for part in PARTS)
    line += f"{row['row_s'] * 1e3:11.2f}{row['rows_per_s']:9.2f}{row['tokens_per_s']:10.0f}"
    line += f"{row['tflops']:9.3g}{row['mfu']:6.1%}, loss {row['loss']:.5f}"
    if "peak_bytes" in row:
        line += f", peak {row['peak_bytes'] / 1e9:.1f} GB"
    if "peak_of_planned" in row:
        line += f" = {row['peak_of_planned']:.2f} of planned"
    if "idle" in row["profile"]:
        line += f", idle {row['profile']['idle']:.1%}"
    print(f"{line}, first {row['first_turn_s']:.1f} s", flush=True)
    for name, calls, ms in row["profile"]["top"][: SHOWN_KERNELS if row["variant"] == OURS.name else 0]:
        print(f"    {ms:10.3f} ms {calls:5} {name[:90]}")


def print_comparison(entry: dict[str, Any]) -> None:
    """The variants beside ours."""
    for row in entry["variants"]:
        if row["variant"] == OURS.name or "time_ratio" not in row:
            continue
        line = f"  {row['variant']:<18} time {row['time_ratio']:.2f} of ours"
        if "memory_ratio" in row:
            line += f", memory {row['memory_ratio']:.2f}"
        if "share_of_gain" in row:
            line += f", {row['share_of_gain']:.0%} of the gain"
        print(f"{line}; loss off by {row['loss_off_by']:.1e}, gradients by {row['gradient_off_by']:.1e}", flush=True)


def parse(cases: tuple[Case, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in cases], help="default: all")
    parser.add_argument("--peers", action="store_true", help="also with a peer's parts")
    parser.add_argument("--engine", action="store_true", help="also under DeepSpeed")
    parser.add_argument("--attention", default="auto", choices=ATTENTION.names)
    parser.add_argument("--loss", default="auto", choices=["auto", "cuda", "cpu", "torch"])
    parser.add_argument("--pointwise", default="auto", choices=["auto", "cuda", "torch"], help="norms, RoPE and SiLU")
    parser.add_argument("--optimizer", default="fused", choices=["fused", "foreach"], help="kind of torch's AdamW")
    parser.add_argument("--rows", type=int, default=8, help="rows of an optimizer step")
    parser.add_argument("--repeats", type=int, default=8 if torch.cuda.is_available() else 3)
    parser.add_argument("--out", type=Path, help="file for the results, rewritten after each variant of each case")
    return parser.parse_args()


def run(case: Case, options: Options, variants: list[Variant], entry: dict[str, Any]) -> Iterator[None]:
    """Fills the case's entry; returns to the caller whenever something new is in it."""
    try:
        peak, _ = limits(options.device, case.torch_dtype)
        entry |= describe(case, options, peak)
    except Exception as error:  # noqa: BLE001  the other cases have their turn
        entry["failed"] = f"{type(error).__name__}: {str(error)[:600]}"
        print(f"\n{case.name}: failed: {entry['failed']}", flush=True)
        yield
        return
    print_case(entry)
    for row in attempts(case, options, variants):
        entry["variants"].append(row)
        compare(entry)
        print_row(row)
        yield
    print_comparison(entry)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = GPU_CASES if device == "cuda" else CPU_CASES
    args = parse(cases)
    torch._dynamo.config.recompile_limit = 64  # each case's mask is compiled anew
    if device == "cpu":
        torch.set_num_threads(1)  # more would wait for each other longer than these shapes take
    options = Options(device, args.attention, args.loss, args.pointwise, args.optimizer, args.rows, args.repeats)
    variants = [OURS, *(PEERS if args.peers else ()), *([ENGINE] if args.engine else ())]
    results: list[dict[str, Any]] = []
    report = {**stamp(["transformers"], device), "command": " ".join(sys.argv), "results": results}
    print(f"{report['device']}, torch {torch.__version__}, commit {report['commit']}")
    if args.peers and device == "cpu":
        print("peers' attention is torch's own with a dense mask: on a CPU FlexAttention has no gradients")
    for case in cases:
        if args.case and case.name not in args.case:
            continue
        results.append({"case": case.name})
        for _ in run(case, options, variants, results[-1]):
            if args.out is not None:
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if torch.distributed.is_initialized():
        from dflash_scale.training.distributed import leave_ranks

        leave_ranks()
    failed = ["failed" in row for entry in results for row in (entry, *entry.get("variants", ()))]
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
