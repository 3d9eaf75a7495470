"""What is wrong with a compiled attention kernel, in steps from one unit and one tile upwards.

    python tests/gpu/ladder.py [--backend sm90] [--rung 3] [--seconds 35] [--dump wrong.pt]

Each rung calls the operators, forward and then backward, beside the definition, and prints a line of JSON per tensor:
its largest error as a share of the row's size and, where it is wrong, how the error lies (errors.py). The first wrong
rung says which part of the kernel is; its tensors go to --dump, if they are few. A hang ends after --seconds with the
line at which it waits; of a library built with `setup.py build_ext --target watchdog` the ladder also prints which
waits of which thread block were given up.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script it must find this checkout's package and tests
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dflash_scale.ops.attention import KERNELS, anchor_attention  # noqa: E402
from dflash_scale.ops.attention_plan import Plan, build_plan  # noqa: E402
from dflash_scale.ops.library import LIBRARY  # noqa: E402
from tests.gpu.errors import TOLERANCE, row_errors, where  # noqa: E402

DTYPE = torch.bfloat16
GRADIENTS = ("dq", "dk_ctx", "dv_ctx", "dk_blk", "dv_blk")
MOST_DUMPED = 4 << 20  # bytes: the archive that they go into has to come back from another machine
MOST_EXACT = 1 << 18  # pairs of slot and token up to which the definition is computed in float64, beyond in float32


@dataclass(frozen=True)
class Rung:
    """One document of `tokens` with blocks at `anchors`; a head of a drafter unless it says otherwise."""

    name: str
    tokens: int
    anchors: tuple[int, ...]
    key_heads: int = 1
    group: int = 4
    head_dim: int = 128
    window: int | None = None
    block: int = 16


RUNGS = (
    Rung("own block alone", 64, (0,)),
    Rung("one unit, one tile", 128, (100,)),
    Rung("one unit, one tile, D 64", 128, (100,), head_dim=64),
    Rung("one unit, one tile, D 96", 128, (100,), head_dim=96),
    Rung("whole tiles", 512, (256,)),
    Rung("rings wrap", 2048, (1500,)),
    Rung("both units", 1024, (500, 700)),
    Rung("a unit without rows", 1024, (100, 500, 700)),
    Rung("window", 2048, (300, 1500, 1600), window=200),
    Rung("padding rows (G 5)", 1024, (500, 700, 900), group=5),
    Rung("heads", 1024, (10, 200, 500, 700), key_heads=8),
    # Of one tile or two each, several for every thread block: a block that takes one after another.
    Rung("many small items", 256, tuple(range(1, 256, 2)), key_heads=8),
    Rung("many blocks", 4096, tuple(range(5, 4096, 32)), key_heads=8),
)


def climb(rung: Rung, seed: int, backend: str, device: str) -> tuple[bool, dict[str, Tensor]]:
    """Whether every tensor is right, and the tensors."""
    anchors = torch.tensor(rung.anchors, dtype=torch.int32, device=device)
    doc_ids = torch.zeros(rung.tokens, dtype=torch.int32, device=device)
    plan = build_plan(anchors, doc_ids, block_size=rung.block, window=rung.window, group=rung.group)
    inputs, dout = make_tensors(rung, seed, device)
    indices = (plan.starts, plan.ends, plan.tile_ranges, plan.order, plan.tile_order)
    options = (rung.block, rung.window or 0, False, rung.head_dim**-0.5, KERNELS[backend])
    out, lse = torch.ops.dflash_scale.anchor_attention(*inputs, *indices, *options)
    settle(device)
    wanted, truth = definition(inputs, dout, plan)
    right = report(rung.name, "out", out, wanted)
    grads = torch.ops.dflash_scale.anchor_attention_backward(dout, *inputs, out, lse, *indices, *options)
    settle(device)
    for name, got, exact in zip(GRADIENTS, grads, truth, strict=True):
        right &= report(rung.name, name, got, exact)
    return right, {"dout": dout, "out": out, "lse": lse, **dict(zip(GRADIENTS, grads, strict=True))}


def make_tensors(rung: Rung, seed: int, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k_ctx, v_ctx, k_blk, v_blk; and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    slots, heads = len(rung.anchors) * rung.block, rung.key_heads
    queries, context, blocks = (slots, heads * rung.group), (rung.tokens, heads), (slots, heads)
    made = [
        torch.randn(*shape, rung.head_dim, generator=generator).to(DTYPE).to(device)
        for shape in (queries, context, context, blocks, blocks, queries)
    ]
    return made[:5], made[5]


def definition(inputs: list[Tensor], dout: Tensor, plan: Plan) -> tuple[Tensor, tuple[Tensor, ...]]:
    pairs = len(inputs[0]) * len(inputs[1])
    compute = torch.float64 if pairs <= MOST_EXACT else torch.float32
    exact = [tensor.to(compute).requires_grad_() for tensor in inputs]
    out = anchor_attention(*exact, plan, backend="reference")
    return out.detach(), torch.autograd.grad(out, exact, dout.to(compute))


def report(rung: str, name: str, got: Tensor, wanted: Tensor) -> bool:
    worst = row_errors(name, got, wanted).max().item()
    right = worst <= TOLERANCE[DTYPE]
    line = {"rung": rung, "tensor": name, "shape": list(got.shape), "ok": right, "error": float(f"{worst:.2e}")}
    print(json.dumps(line if right else line | where(name, got, wanted, TOLERANCE[DTYPE])), flush=True)
    return right


def settle(device: str) -> None:
    """Waits for the kernels, and prints the waits that a library with the watchdog gave up."""
    if device == "cuda":
        torch.cuda.synchronize()
    library = ctypes.CDLL(str(LIBRARY))
    for part in ("forward", "backward"):
        if hasattr(library, f"dflash_stuck_{part}"):
            records = (ctypes.c_int * (4 * 255))()  # StuckWait of csrc/attention/watchdog.h
            count = getattr(library, f"dflash_stuck_{part}")(records, 255)
            waits = [tuple(records[4 * i : 4 * i + 4]) for i in range(min(count, 255))]
            by_warp = sorted({(block, thread // 32, hex(barrier), parity) for block, thread, barrier, parity in waits})
            print(json.dumps({"given up": part, "count": count, "block, warp, barrier, parity": by_warp[:60]}))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="sm90", choices=KERNELS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rung", type=int, action="append", choices=range(len(RUNGS)), help="default: all")
    parser.add_argument("--dump", type=Path, help="file for the first wrong rung's tensors, if they are few")
    parser.add_argument("--seconds", type=int, help="after so many it says where it hangs, and ends")
    args = parser.parse_args(arguments)
    if args.seconds is not None:
        faulthandler.dump_traceback_later(args.seconds, exit=True)
    good = True
    for number in args.rung or range(len(RUNGS)):
        rung = RUNGS[number]
        print(json.dumps({"begins": rung.name, "rung": number}), flush=True)
        right, tensors = climb(rung, number, args.backend, args.device)
        small = sum(tensor.nbytes for tensor in tensors.values()) <= MOST_DUMPED
        if not right and good and small and args.dump is not None:
            torch.save(tensors, args.dump)
        good = good and right
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
