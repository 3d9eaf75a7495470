"""Holds the attention on this machine's GPU to the definition, with torch alone: `python tests/gpu/check.py`.

Writes what it found as JSON with --out. A file of it in benchmarks/results, in which a kernel passed, is what
a backend's `proof` names. --device cpu tries the script itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import platform
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script it must find this checkout's package and tests
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch import Tensor  # noqa: E402

from dflash_scale.ops.attention import ATTENTION, KERNELS, anchor_attention  # noqa: E402
from dflash_scale.ops.attention_plan import build_plan  # noqa: E402
from dflash_scale.ops.library import LIBRARY, MISSING  # noqa: E402
from tests.gpu.errors import TOLERANCE, row_errors, where  # noqa: E402
from tests.support.attention_cases import NAMES, Case, case, outputs  # noqa: E402

MOST_SCORES = 4e7  # of a random case: the definition holds several tensors of them in float64
PLAN_TENSORS = ("starts", "ends", "tile_ranges", "order", "tile_order")


def compare(what: object, got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    wrong = []
    for name, x, y in zip(NAMES, got, wanted, strict=True):
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)} instead of {tuple(y.shape)} for {what}"
        if x.numel() == 0:
            continue
        worst = row_errors(name, x, y).max().item()
        if not worst <= tolerance:
            place = json.dumps(where(name, x, y, tolerance))
            wrong.append(f"{name} {tuple(x.shape)} is off by {worst:.2e} of its size {place}")
    assert not wrong, f"{', '.join(wrong)} for {what}"


def compare_with_definition(some: Case, backend: str, device: str) -> None:
    wanted = outputs(some, "reference", device, compute=torch.float64)
    try:
        got = outputs(some, backend, device)
    except RuntimeError as error:
        error.add_note(str(some))  # a fault on the device does not say where it came from
        raise
    compare(some, got, wanted, TOLERANCE[some.dtype])


def compare_all(cases: Iterable[Case], backend: str, device: str) -> None:
    """All that the backend takes; which ones are wrong says more than that one is."""
    wrong = []
    for some in cases:
        if runs(some, backend, device):
            try:
                compare_with_definition(some, backend, device)
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, f"{len(wrong)} wrong: " + " | ".join(wrong)


def drawn(generator: random.Random) -> Case:
    pick = generator.choice
    lengths = tuple(pick([1, 2, 7, 40, 128, 200, 300, 777]) for _ in range(generator.randint(1, 6)))
    block_size, key_heads, group = pick([2, 3, 5, 8, 10, 16, 32]), pick([1, 2, 4]), pick([1, 2, 4, 5, 7, 8])
    most = MOST_SCORES / (sum(lengths) ** 2 * block_size * key_heads * group)
    return Case(
        lengths=lengths,
        padding=pick([0, 1, 130]),
        density=min(pick([0.02, 0.1, 0.3]), most),
        block_size=block_size,
        key_heads=key_heads,
        group=group,
        head_dim=pick([64, 96, 128, 256]),
        window=pick([None, None, 1, 2, 6, 64, 500]),
        causal_block=pick([False, True]),
        dtype=pick([torch.bfloat16, torch.float16]),
        seed=generator.randrange(1000),
    )


def runs(some: Case, backend: str, device: str) -> bool:
    plan = some.plan(device)
    tensors = tuple(tensor.requires_grad_() for tensor in some.tensors(plan))
    return ATTENTION.backend(backend).obstacle(tensors, plan, 1.0) is None


def check_fixed_cases(backend: str, device: str) -> None:
    """Every head dim, every group, and what tends to be forgotten."""
    wide: dict[str, Any] = {"head_dim": 128, "group": 4, "block_size": 16, "dtype": torch.bfloat16, "density": 0.1}
    changes: list[dict[str, Any]] = [
        {"lengths": (1, 1, 1, 1), "padding": 0, "density": 1.0},
        {"lengths": (1000,), "density": 0.05},
        {"lengths": (129, 127, 1, 255), "padding": 77, "window": 100},
        {"lengths": (700, 41), "window": 1, "causal_block": True},
        {"lengths": (300,), "block_size": 32, "window": 20, "causal_block": True},
        {"lengths": (400, 30), "block_size": 2, "density": 1.0},
        {"lengths": (50, 3000), "density": 0.005},
        *({"head_dim": width, "lengths": (333, 90)} for width in (64, 96, 128, 256)),
        *({"group": group, "lengths": (333, 90), "dtype": torch.float16} for group in (1, 2, 4, 5, 7, 8)),
    ]
    compare_all((case(**(wide | change)) for change in changes), backend, device)


def check_random_cases(backend: str, device: str, seconds: float = 10.0) -> None:
    generator, until, done = random.Random(20), time.monotonic() + seconds, 0
    while done < 5 or (time.monotonic() < until and done < 150):
        some = drawn(generator)
        if runs(some, backend, device):
            compare_with_definition(some, backend, device)
            done += 1


def check_small_cases(backend: str, device: str) -> None:
    """A few tiles of every head dim: what compute-sanitizer has the patience for."""
    kinds = [(width, *rest) for width in (64, 96, 128, 256) for rest in ((None, 4), (9, 5))]
    cases = (
        case(head_dim=width, window=window, group=group, density=0.1, dtype=torch.bfloat16)
        for width, window, group in kinds
    )
    compare_all(cases, backend, device)


def check_no_anchor(backend: str, device: str) -> None:
    some = case(density=0.0, head_dim=64, dtype=torch.bfloat16)
    out, dq, dk_ctx, dv_ctx, dk_blk, _ = outputs(some, backend, device)
    assert out.shape == dq.shape == (0, 4, 64) and dk_blk.shape == (0, 2, 64)
    assert dk_ctx.shape == (264, 2, 64) and not dk_ctx.any() and not dv_ctx.any(), "gradient of context unseen"


def check_repeats_bit_for_bit(backend: str, device: str) -> None:
    if backend == "flex":
        return  # torch makes no such promise
    for window in (None, 64):
        some = case(lengths=(900, 300, 80), density=0.3, head_dim=128, group=4, block_size=16, window=window,
                    dtype=torch.bfloat16)  # fmt: skip
        first = outputs(some, backend, device)
        for _ in range(3):
            for name, x, y in zip(NAMES, first, outputs(some, backend, device), strict=True):
                assert torch.equal(x, y), f"{name} differs between two runs of {some}"


def check_strides_and_scale(backend: str, device: str) -> None:
    some = case(head_dim=64, dtype=torch.bfloat16)
    plan = some.plan(device)
    tensors = [tensor.requires_grad_() for tensor in some.tensors(plan)]
    strided = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in tensors]
    results = []
    for inputs in (tensors, strided):
        out = anchor_attention(*inputs, plan, backend=backend, scale=0.3)
        out.sum().backward()  # an expanded gradient, with strides of zero
        results.append([out.detach(), *[tensor.grad for tensor in inputs if tensor.grad is not None]])
    compare(f"strides of {some}", results[0], results[1], TOLERANCE[some.dtype])
    doubles = [tensor.detach().double() for tensor in tensors]
    wanted = anchor_attention(*doubles, plan, backend="reference", scale=0.3)
    assert row_errors("out", results[0][0], wanted).max() <= TOLERANCE[some.dtype]


def large_case() -> Case:
    """T = 131072, A*S near 65536, one document that is most of it."""
    return case(lengths=(100_000, 30_000, 1_000), padding=72, density=1 / 32, block_size=16, key_heads=1, group=2,
                head_dim=64, dtype=torch.bfloat16)  # fmt: skip


def chunked_reference(some: Case, device: str, blocks: int = 48) -> list[Tensor]:
    """The definition in float32, some blocks at a time: dense scores of the whole case would not fit."""
    plan = some.plan(device)
    q, k_ctx, v_ctx, k_blk, v_blk = (tensor.float() for tensor in some.tensors(plan))
    generator = torch.Generator().manual_seed(some.seed + 2)
    dout = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(some.dtype).to(device).float()
    parts: dict[str, list[Tensor]] = {name: [] for name in ("out", "dq", "dk_blk", "dv_blk")}
    dk_ctx, dv_ctx = torch.zeros_like(k_ctx), torch.zeros_like(v_ctx)
    for begin in range(0, plan.anchors.numel(), blocks):
        anchors = plan.anchors[begin : begin + blocks]
        piece = build_plan(anchors, plan.doc_ids, block_size=some.block_size, window=some.window,
                           causal_block=some.causal_block, group=some.group)  # fmt: skip
        rows = slice(begin * some.block_size, (begin + blocks) * some.block_size)
        inputs = [x.detach().requires_grad_() for x in (q[rows], k_ctx, v_ctx, k_blk[rows], v_blk[rows])]
        out = anchor_attention(*inputs, piece, backend="reference")
        grads = torch.autograd.grad(out, inputs, dout[rows])
        dk_ctx += grads[1]
        dv_ctx += grads[2]
        for name, part in (("out", out.detach()), ("dq", grads[0]), ("dk_blk", grads[3]), ("dv_blk", grads[4])):
            parts[name].append(part)
    out, dq, dk_blk, dv_blk = (torch.cat(part) for part in parts.values())
    return [out, dq, dk_ctx, dv_ctx, dk_blk, dv_blk]


def check_large(backend: str, device: str) -> None:
    some = large_case() if device == "cuda" else case(lengths=(2000,), head_dim=64, dtype=torch.bfloat16)
    compare(some, outputs(some, backend, device), chunked_reference(some, device), TOLERANCE[some.dtype])


def check_cuda_graph(backend: str, device: str) -> None:
    """Plan, forward and backward are captured and replayed on new inputs: nothing syncs or depends on the host."""
    if device != "cuda" or backend == "flex":
        return
    some = case(lengths=(500, 300), density=0.1, head_dim=64, dtype=torch.bfloat16)
    plan = some.plan(device)
    tensors = [tensor.requires_grad_() for tensor in some.tensors(plan)]
    dout = torch.randn_like(tensors[0])

    def step() -> tuple[Tensor, ...]:
        built = build_plan(plan.anchors, plan.doc_ids, block_size=4, group=2)
        out = anchor_attention(*tensors, built, backend=backend)
        return (out, *torch.autograd.grad(out, tensors, dout))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
        # As many anchors elsewhere: the graph has to make the plan again.
        moved = torch.sort(torch.randperm(800, device=device)[: plan.anchors.numel()]).values
        plan.anchors.copy_(moved.int())
    graph.replay()
    for name, x, y in zip(NAMES, captured, step(), strict=True):
        assert torch.equal(x, y), f"{name} of a replayed graph is not that of a launch"


def check_plan(backend: str, device: str) -> None:
    """The plan's kernel gives the integers of the CPU operator."""
    generator = random.Random(5)
    some = [drawn(generator) for _ in range(60)] + [large_case(), case(density=0.0), case(group=65)]
    for one in some:
        here, there = one.plan(device), one.plan("cpu")
        for name in PLAN_TENSORS:
            got, wanted = getattr(here, name).cpu(), getattr(there, name)
            assert torch.equal(got, wanted), f"{name} of the plan differs for {one}"
    if device == "cuda":
        # Anchors that a CPU plan would refuse make a wrong plan, but touch no foreign memory (compute-sanitizer sees).
        anchors = torch.tensor([900, -5, 2**31 - 1, 3, 700, -(2**31)], dtype=torch.int32, device=device)
        doc_ids = torch.zeros(1000, dtype=torch.int32, device=device)
        build_plan(anchors, doc_ids, block_size=16, window=7, group=4)
        torch.cuda.synchronize()


CHECKS: dict[str, Callable[[str, str], None]] = {
    "small cases": check_small_cases,
    "fixed cases": check_fixed_cases,
    "no anchor": check_no_anchor,
    "strides and scale": check_strides_and_scale,
    "repeats bit for bit": check_repeats_bit_for_bit,
    "CUDA graph": check_cuda_graph,
    "random cases": check_random_cases,
    "large": check_large,
}


def usable(device: str) -> list[str]:
    """The compiled backends that this machine runs a plain case with."""
    some = case(head_dim=128, dtype=torch.bfloat16)
    return [name for name in KERNELS if runs(some, name, device)]


def source_digest(backend: str, operator: str = "attention") -> str:
    """sha256 over a GPU kernel's sources: its .cu files and what they include of its folder, in the order of their
    names. `backend` is how the names of the files begin, "" for all."""
    folder = ROOT / "csrc" / operator
    found, todo = set[Path](), sorted(folder.glob(f"{backend}*.cu"))
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += [ROOT / "csrc" / name for name in re.findall(rf'#include "({operator}/.+)"', path.read_text())]
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run_one(name: str, check: Callable[[str, str], None], backend: str, device: str) -> dict[str, Any]:
    started = time.monotonic()
    print(f"{backend:<6} {name:<22} begins", flush=True)  # a check that hangs is named
    try:
        check(backend, device)
        error = None
    except Exception as problem:  # noqa: BLE001  a kernel may fail in any way, and the next check still has its say
        error = "".join(traceback.format_exception_only(problem)).strip()
    seconds = round(time.monotonic() - started, 1)
    print(f"{backend:<6} {name:<22} {'ok' if error is None else 'FAILED'} {seconds:.1f} s", flush=True)
    if error is not None:
        print(f"       {error[:4000]}", flush=True)
    return {"check": name, "ok": error is None, "seconds": seconds, "error": error}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backend", action="append", help="default: all compiled ones that run here")
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="default: all checks")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--seconds", type=int, help="after so many it says where it hangs, and ends")
    args = parser.parse_args(arguments)
    if args.seconds is not None:
        faulthandler.dump_traceback_later(args.seconds, exit=True)
    on_gpu = args.device == "cuda"
    torch._dynamo.config.recompile_limit = 64  # FlexAttention is compiled for each number of heads
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "library": None if MISSING else hashlib.sha256(LIBRARY.read_bytes()).hexdigest(),
        "plan": run_one("plan", check_plan, "plan", args.device),
        "backends": {},
    }
    passed = report["plan"]["ok"]
    for backend in args.backend or usable(args.device):
        chosen = {name: CHECKS[name] for name in args.only or CHECKS}
        done: list[dict[str, Any]] = []
        entry = report["backends"][backend] = {"result": "", "sources": source_digest(backend), "checks": done}
        for name, check in chosen.items():
            done.append(run_one(name, check, backend, args.device))
            # A part of the checks proves nothing. Written after each: the next one may hang.
            whole = len(done) == len(CHECKS)
            ok = all(one["ok"] for one in done)
            entry["result"] = ("passed" if whole else "passed in part") if ok else "failed"
            if args.out is not None:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
        passed = passed and ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
