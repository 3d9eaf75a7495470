"""Attention of the drafter's blocks over the verifier's context: the operator, and the choice of its implementation.

T tokens in a packed row · A anchors · S block size · Hq/Hkv query and key heads, any Hq = G * Hkv · D head dim

The block at anchor a of document d: the query at slot k sees context position p if p is in d, p < a and, with a window
W, p > (a + k) - W; and slot j of its own block, with `causal_block` only j <= k, with a window only k - j < W. W counts
back from the query, as vLLM's sliding window does when it serves the drafter. An anchor's own context row is never
seen: at serving time the anchor is the token just sampled, and the verifier has not yet computed its state.

attention_plan.py says which context each block sees, attention_reference.py is the definition in plain torch.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_scale.attention_flex import attention_flex
from dflash_scale.attention_plan import COMPILED, LIBRARY, MISSING, TILE, Plan, build_plan
from dflash_scale.attention_reference import attention_reference, visible_block, visible_context

__all__ = [
    "BACKENDS",
    "LIBRARY",
    "MISSING",
    "PROVEN",
    "TILE",
    "Plan",
    "anchor_attention",
    "build_plan",
    "visible_block",
    "visible_context",
]

log = logging.getLogger(__name__)

BACKENDS = ("auto", "sm90", "sm80", "cpu", "flex", "reference")
FASTEST = {"cpu": ("cpu", "reference"), "cuda": ("sm90", "sm80", "flex", "reference")}  # "auto" takes the first it can
KERNELS = {"cpu": 0, "sm80": 80, "sm90": 90}  # the operator's number of each compiled kernel
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = (torch.bfloat16, torch.float16)
GPU_HEAD_DIMS = {"sm90": (64, 96, 128), "sm80": (64, 96, 128, 256)}
# First and last compute capability: sm_80 code is also in the library as PTX, for GPUs newer than both machine codes.
GPU_CAPABILITIES = {"sm90": ((9, 0), (9, 0)), "sm80": ((8, 0), None)}
GPU_MAX_GROUP = GPU_MAX_BLOCK = 64
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Proof:
    """That a GPU kernel matched the reference on a device: a file in benchmarks/results, written by gpu_check.sh, and
    the sha256 of the sources that it was compiled from (tests/gpu/check.py, `source_digest`)."""

    results: str
    sources: str


# "auto" takes only GPU kernels that stand here; a test holds each entry to its file and to today's sources.
PROVEN: dict[str, Proof] = {}


def anchor_attention(
    q: Tensor,
    k_ctx: Tensor,
    v_ctx: Tensor,
    k_blk: Tensor,
    v_blk: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every block over its context and itself; differentiable in the five tensors.

    q (A*S, Hq, D) · k_ctx, v_ctx (T, Hkv, D) · k_blk, v_blk (A*S, Hkv, D), one dtype and device · scale None = D**-0.5.
    Under autocast they are cast to its dtype first, as in torch's own attention.

    backend, one name = one implementation:
      "auto"       the fastest of these that takes the tensors, GPU kernels only where PROVEN; logged once
      "sm90"       Hopper: bfloat16 and float16, head dims 64, 96, 128
      "sm80"       Ampere and newer: bfloat16 and float16, head dims 64, 96, 128, 256
      "cpu"        float32, bfloat16 with float32 arithmetic, float64
      "flex"       FlexAttention fed by the plan: any GPU with Triton; forward only on a CPU
      "reference"  plain torch with a dense mask: any device and floating dtype, in O(A * S * Hq * T) memory
    "sm90", "sm80" and "cpu" repeat bit for bit; "cpu" also whatever the number of threads.

    Returns (A*S, Hq, D) in the dtype of q. Raises ValueError for tensors that do not fit each other or the plan, and
    for a named backend that cannot run them: only "auto" ever takes another one.
    """
    if q.device.type in FASTEST and torch.is_autocast_enabled(q.device.type):
        cast = [_autocast(tensor) for tensor in (q, k_ctx, v_ctx, k_blk, v_blk)]
        with torch.autocast(q.device.type, enabled=False):
            return anchor_attention(cast[0], cast[1], cast[2], cast[3], cast[4], plan, scale=scale, backend=backend)
    _check_tensors(q, k_ctx, v_ctx, k_blk, v_blk, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = (q, k_ctx, v_ctx, k_blk, v_blk)
    chosen = _choose(backend, tensors, plan, scale)
    if chosen == "reference" or (chosen == "flex" and plan.anchors.shape[0] == 0):  # flex takes no empty tensors
        return attention_reference(*tensors, plan, scale)
    if chosen == "flex":
        return attention_flex(*tensors, plan, scale)
    indices = (plan.starts, plan.ends, plan.tile_ranges, plan.order, plan.tile_order)
    options = (plan.block_size, plan.window or 0, plan.causal_block, scale, KERNELS[chosen])
    out, _ = torch.ops.dflash_scale.anchor_attention(*[x.contiguous() for x in tensors], *indices, *options)
    return out


def _autocast(tensor: Tensor) -> Tensor:
    # float64 is left alone, as torch does it.
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check_tensors(q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan) -> None:
    named = {"q": q, "k_ctx": k_ctx, "v_ctx": v_ctx, "k_blk": k_blk, "v_blk": v_blk}
    for name, tensor in named.items():
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (rows, heads, head dim), got {tuple(tensor.shape)}.")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q is {q.dtype} on {q.device}, {name} {tensor.dtype} on {tensor.device}; all five must be alike."
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q must have a floating dtype, got {q.dtype}.")
    if plan.starts.device != q.device:
        raise ValueError(f"the plan is on {plan.starts.device}, the tensors on {q.device}; build it where they are.")
    slots, tokens = plan.anchors.numel() * plan.block_size, plan.doc_ids.numel()
    heads, key_heads, width = q.shape[1], k_ctx.shape[1], q.shape[2]
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(f"q has {heads} heads, which is no multiple of the {key_heads} heads of k_ctx.")
    if heads // key_heads != plan.group:
        raise ValueError(
            f"the plan was built for {plan.group} query heads per kv head, q and k_ctx have {heads} over {key_heads}; "
            f"build it with group={heads // key_heads}."
        )
    wanted = {
        "q": (slots, heads, width),
        "k_ctx": (tokens, key_heads, width),
        "v_ctx": (tokens, key_heads, width),
        "k_blk": (slots, key_heads, width),
        "v_blk": (slots, key_heads, width),
    }
    for name, shape in wanted.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for a plan of {plan.anchors.numel()} anchors, blocks of {plan.block_size} and "
                f"{tokens} tokens; got {tuple(named[name].shape)}."
            )


def _choose(backend: str, tensors: tuple[Tensor, ...], plan: Plan, scale: float) -> str:
    """The backend that runs, never "auto"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    if backend != "auto":
        reason = obstacle(backend, tensors, plan, scale)
        if reason is not None:
            others = [name for name in BACKENDS[1:] if obstacle(name, tensors, plan, scale) is None]
            raise ValueError(f'attention backend "{backend}" {reason}; use backend="{others[0]}" or "auto".')
        return backend
    device = tensors[0].device.type
    passed: list[str] = []
    for name in FASTEST.get(device, ("reference",)):
        reason = obstacle(name, tensors, plan, scale)
        if reason is None and name in ("sm90", "sm80") and name not in PROVEN:
            reason = "has not been proven against the reference on a GPU yet"
        if reason is None:
            if not torch.compiler.is_compiling():
                _log_choice(device, name, "; ".join(passed))
            return name
        passed.append(f'"{name}" {reason}')
    raise AssertionError("the reference takes everything")


@functools.cache
def _log_choice(device: str, chosen: str, passed: str) -> None:
    level = logging.WARNING if chosen == "reference" else logging.INFO
    log.log(level, 'attention on %s runs backend "%s"%s', device, chosen, f": {passed}" if passed else "")


def obstacle(backend: str, tensors: tuple[Tensor, ...], plan: Plan, scale: float = 1.0) -> str | None:
    """Why a backend cannot run these tensors, as the rest of a sentence that starts with its name; None if it can."""
    if backend in ("sm90", "sm80"):
        return _gpu_obstacle(backend, tensors[0], plan, scale)
    if backend == "cpu":
        return _cpu_obstacle(tensors[0])
    if backend == "flex":
        return _flex_obstacle(tensors)
    return None


def _gpu_obstacle(backend: str, q: Tensor, plan: Plan, scale: float) -> str | None:
    if q.device.type != "cuda":
        return f"needs CUDA tensors, got {q.device}"
    if not COMPILED["cuda"]:
        return f"needs the compiled operators, but {MISSING or f'{LIBRARY.name} was built without nvcc'}"
    capability = _capability(q.device)
    first, last = GPU_CAPABILITIES[backend]
    if capability < first or (last is not None and capability > last):
        wanted = f"{first[0]}.{first[1]}" + (" or newer" if last is None else "")
        return f"needs a GPU of compute capability {wanted}, got {capability[0]}.{capability[1]}"
    if q.dtype not in GPU_DTYPES:
        return f"takes bfloat16 and float16, got {q.dtype}"
    if q.shape[2] not in GPU_HEAD_DIMS[backend]:
        return f"takes head dims {', '.join(map(str, GPU_HEAD_DIMS[backend]))}, got {q.shape[2]}"
    if plan.group > GPU_MAX_GROUP:
        return f"takes up to {GPU_MAX_GROUP} query heads per kv head, got {plan.group}"
    if scale <= 0:
        return f"takes a positive scale, got {scale}"
    if plan.block_size > GPU_MAX_BLOCK:
        return f"takes blocks of up to {GPU_MAX_BLOCK} slots, got {plan.block_size}"
    return None


def _cpu_obstacle(q: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"needs CPU tensors, got {q.device}"
    if MISSING:
        return f"needs the compiled operators, but {MISSING} (run `pip install -e .` in the repository)"
    if q.dtype not in CPU_DTYPES:
        return f"takes float32, bfloat16 and float64, got {q.dtype}"
    return None


def _flex_obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    q = tensors[0]
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "has no gradients on a CPU"
        return None
    if q.device.type != "cuda":
        return f"needs CUDA or CPU tensors, got {q.device}"
    if not HAS_TRITON:
        return "needs Triton on a GPU, which is not installed"
    if q.dtype not in (*GPU_DTYPES, torch.float32):
        return f"takes bfloat16, float16 and float32 on a GPU, got {q.dtype}"
    if not 16 <= q.shape[2] <= 256:
        return f"takes head dims 16 to 256 on a GPU, got {q.shape[2]}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    return properties.major, properties.minor


def _fake_forward(q: Tensor, *_: Tensor | int | float) -> tuple[Tensor, Tensor]:
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=statistic)


def _fake_backward(
    dout: Tensor, q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, *_: Tensor | int | float
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k_ctx, v_ctx, k_blk, v_blk))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    tensors, options = inputs[:10], inputs[10:]
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors[:5], out, lse, *tensors[5:])
    ctx.options = options  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    options = ctx.options  # type: ignore[attr-defined]
    grads = torch.ops.dflash_scale.anchor_attention_backward(dout.contiguous(), *saved, *options)
    return (*grads, *[None] * 10)


if not MISSING:
    torch.library.register_fake("dflash_scale::anchor_attention", _fake_forward)
    torch.library.register_fake("dflash_scale::anchor_attention_backward", _fake_backward)
    torch.library.register_autograd("dflash_scale::anchor_attention", _backward, setup_context=_setup_context)
