"""Attention of the drafter's blocks over the verifier's context: the operator, and the choice of its implementation.

T tokens in a packed row · A anchors · S block size · Hq/Hkv query and key heads, any Hq = G * Hkv · D head dim

The block at anchor a of document d: the query at slot k sees context position p if p is in d, p < a and, with a window
W, p > (a + k) - W; and slot j of its own block, with `causal_block` only j <= k, with a window only k - j < W. W counts
back from the query, as vLLM's sliding window does when it serves the drafter. An anchor's own context row is never
seen: at serving time the anchor is the token just sampled, and the verifier has not yet computed its state.

attention_plan.py says which context each block sees, attention_reference.py is the definition in plain torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_scale.ops.attention_flex import attention_flex
from dflash_scale.ops.attention_plan import Plan
from dflash_scale.ops.attention_reference import attention_reference
from dflash_scale.ops.backends import Backend, Operator
from dflash_scale.ops.library import MISSING

HALVES = (torch.bfloat16, torch.float16)
MAX_GROUP = MAX_BLOCK = 64  # of the GPU kernels
HAS_TRITON = importlib.util.find_spec("triton") is not None

Tensors = tuple[Tensor, ...]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Plan, float], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel of the compiled operator, by its number there."""

    number: int

    def __call__(
        self, q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan, scale: float
    ) -> Tensor:
        tensors = [x.contiguous() for x in (q, k_ctx, v_ctx, k_blk, v_blk)]
        indices = (plan.starts, plan.ends, plan.tile_ranges, plan.order, plan.tile_order)
        options = (plan.block_size, plan.window or 0, plan.causal_block, scale, self.number)
        out, _ = torch.ops.dflash_scale.anchor_attention(*tensors, *indices, *options)
        return out


def _gpu_limits(tensors: Tensors, plan: Plan, scale: float) -> str | None:
    """up to 64 query heads per kv head, up to 64 slots in a block, a positive scale"""
    if plan.group > MAX_GROUP:
        return f"takes up to {MAX_GROUP} query heads per kv head, got {plan.group}"
    if scale <= 0:
        return f"takes a positive scale, got {scale}"
    if plan.block_size > MAX_BLOCK:
        return f"takes blocks of up to {MAX_BLOCK} slots, got {plan.block_size}"
    return None


def _flex_limits(tensors: Tensors, plan: Plan, scale: float) -> str | None:
    """on a GPU it needs Triton; on a CPU it takes anything, for the forward alone"""
    if tensors[0].device.type == "cuda":
        return None if HAS_TRITON else "needs Triton on a GPU, which is not installed"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "has no gradients on a CPU"
    return None


ATTENTION = Operator[Attend](
    name="attention",
    setting="drafter.attention_backend",
    backends=(
        Backend(
            "sm90",
            Kernel(90),
            device="cuda",
            dtypes=HALVES,
            head_dims=(64, 96, 128),
            capability=((9, 0), (9, 0)),
            compiled=True,
            limits=_gpu_limits,
        ),
        Backend(
            "sm80",
            Kernel(80),
            device="cuda",
            dtypes=HALVES,
            head_dims=(64, 96, 128, 256),
            capability=((8, 0), None),  # the library holds its code as PTX too, for GPUs newer than both machine codes
            compiled=True,
            limits=_gpu_limits,
        ),
        Backend("cpu", Kernel(0), device="cpu", dtypes=(torch.float32, torch.bfloat16, torch.float64), compiled=True),
        Backend(
            "flex",
            attention_flex,
            device="cuda",
            also_on="cpu",
            dtypes=(*HALVES, torch.float32),
            head_dims=range(16, 257),
            limits=_flex_limits,
        ),
        Backend("reference", attention_reference, slow=True),
    ),
)
# The compiled operator's number of each of its kernels.
KERNELS = {backend.name: backend.run.number for backend in ATTENTION.backends if isinstance(backend.run, Kernel)}


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

    backend: a name of ATTENTION, whose rows say what each one takes; docs/kernels.md has them as a table. "auto" is the
    first of them that takes the tensors, a GPU kernel only where it is proven; logged once. "sm90", "sm80" and "cpu"
    repeat bit for bit, "cpu" also whatever the number of threads; "reference" needs O(A * S * Hq * T) memory.

    Returns (A*S, Hq, D) in the dtype of q. Raises ValueError for tensors that do not fit each other or the plan, and
    for a named backend that cannot run them: only "auto" ever takes another one.
    """
    if q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        cast = [_autocast(tensor) for tensor in (q, k_ctx, v_ctx, k_blk, v_blk)]
        with torch.autocast(q.device.type, enabled=False):
            return anchor_attention(cast[0], cast[1], cast[2], cast[3], cast[4], plan, scale=scale, backend=backend)
    _check_tensors(q, k_ctx, v_ctx, k_blk, v_blk, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = (q, k_ctx, v_ctx, k_blk, v_blk)
    chosen = ATTENTION.choose(backend, tensors, plan, scale)
    return chosen.run(*tensors, plan, scale)


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
