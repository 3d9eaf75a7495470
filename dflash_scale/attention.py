"""Attention of the drafter's blocks over the verifier's context: the plan, the operator, the plain-torch definition.

T tokens in a packed row · A anchors · S block size · Hq/Hkv query and key heads, any Hq = G * Hkv · D head dim

The block at anchor a of document d: the query at slot k sees context position p if p is in d, p < a and, with a window
W, p > (a + k) - W; and slot j of its own block, with `causal_block` only j <= k, with a window only k - j < W. W counts
back from the query, as vLLM's sliding window does when it serves the drafter. An anchor's own context row is never
seen: at serving time the anchor is the token just sampled, and the verifier has not yet computed its state.

Documents are contiguous in a row and anchors ascend, so every block sees one interval of the context. The plan is those
intervals, O(A + T/128 + A*S*G/128) integers and no mask. It is built once per step and window, and serves all layers, forward and
backward.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TILE = 128  # keys per tile of `Plan.tile_ranges`; kTile in csrc/attention/plan.h
MAX_WEIGHT = 1023  # work is ordered by weights up to here; kWeights - 1 there
LIBRARY = Path(__file__).with_name("_kernels.so")
BACKENDS = ("auto", "cpu", "reference")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _load_library() -> str | None:
    """Loads the operators; returns why that was not possible, or None."""
    if not LIBRARY.is_file():
        return f"{LIBRARY.name} has not been built"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded ({error})"
    return None


MISSING = _load_library()
# Devices with a compiled plan: none without the library, and no GPU where it was built without nvcc.
PLAN_KERNEL = {
    device.lower(): not MISSING and torch._C._dispatch_has_kernel_for_dispatch_key("dflash_scale::build_plan", device)
    for device in ("CPU", "CUDA")
}


@dataclass(frozen=True, eq=False)
class Plan:
    """Which context each block sees. Tensors are int32 on the device of the anchors; made by `build_plan`.

    anchors (A,) · doc_ids (T,): what the plan was built from, not copied.
    starts, ends (A,): block j sees [starts[j], ends[j]) at slot 0; with a window the lower bound rises by one per slot.
    tile_ranges (ceil(T/128), 2): first and one past the last block that sees each tile of 128 keys.
    order (items,): the work items of the GPU kernels (`item_positions`) by falling number of key tiles, equal ones
    ascending. tile_order (ceil(T/128),): the key tiles by falling number of blocks that see them, likewise.
    """

    anchors: Tensor
    doc_ids: Tensor
    starts: Tensor
    ends: Tensor
    tile_ranges: Tensor
    order: Tensor
    tile_order: Tensor
    block_size: int
    window: int | None
    causal_block: bool
    group: int


def item_positions(group: int) -> int:
    """Query positions of a work item: two units of up to 64 rows, a row being one of the G heads of a kv head."""
    return 2 * max(1, 64 // group)


def build_plan(
    anchors: Tensor,
    doc_ids: Tensor,
    *,
    block_size: int,
    window: int | None = None,
    causal_block: bool = False,
    group: int = 1,
) -> Plan:
    """Builds the plan on the device of `anchors`: on CUDA in one launch, with no host sync.

    anchors: (A,) int32, ascending, each inside a document; A may be 0.
    doc_ids: (T,) int32, one contiguous run per document, -1 = padding.
    window: sliding window W in tokens, the query included; None = full attention.
    group: G = Hq / Hkv, the query heads that share a kv head.

    Raises ValueError for wrong shapes, dtypes or devices; and for wrong values where the tensors are on the CPU (on
    CUDA that would need a host sync: there wrong values give a wrong result, but never touch foreign memory).
    """
    for name, tensor, letter in (("anchors", anchors, "A"), ("doc_ids", doc_ids, "T")):
        if tensor.dim() != 1 or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be ({letter},) int32, got {tuple(tensor.shape)} {tensor.dtype}.")
    if anchors.device != doc_ids.device:
        raise ValueError(f"anchors are on {anchors.device} but doc_ids on {doc_ids.device}; move them to one device.")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, or None for full attention; got {window}.")
    if group < 1:
        raise ValueError(f"group, the query heads per kv head, must be at least 1; got {group}.")
    if anchors.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(anchors, doc_ids)
    anchors, doc_ids = anchors.contiguous(), doc_ids.contiguous()
    build = torch.ops.dflash_scale.build_plan if PLAN_KERNEL.get(anchors.device.type) else _plan_reference
    integers = build(anchors, doc_ids, block_size, window or 0, group)
    return Plan(anchors, doc_ids, *integers, block_size, window, causal_block, group)


def _check_values(anchors: Tensor, doc_ids: Tensor) -> None:
    runs = torch.unique_consecutive(doc_ids)
    runs = runs[runs >= 0]
    if runs.numel() != torch.unique(runs).numel():
        raise ValueError("doc_ids must hold each document as one contiguous run; a document id comes back later.")
    if anchors.numel() == 0:
        return
    first, last = int(anchors.min()), int(anchors.max())
    if first < 0 or last >= doc_ids.numel():
        raise ValueError(f"anchors must lie in [0, {doc_ids.numel()}), got {first} .. {last}.")
    if bool((anchors[1:] < anchors[:-1]).any()):
        raise ValueError("anchors must ascend; sort them before building the plan.")
    if bool((doc_ids[anchors] < 0).any()):
        raise ValueError("an anchor lies in padding (doc_ids is -1 there); draw anchors inside documents only.")


def _plan_reference(
    anchors: Tensor, doc_ids: Tensor, block_size: int, window: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The plan in plain torch: what the operators are tested against, and what "reference" uses without them."""
    tokens, device = doc_ids.numel(), anchors.device
    rows = torch.arange(tokens, device=device)
    opens = torch.ones(tokens, dtype=torch.bool, device=device)
    opens[1:] = doc_ids[1:] != doc_ids[:-1]
    document_starts = torch.cummax(torch.where(opens, rows, 0), 0).values
    ends = anchors.clone()
    starts = document_starts[anchors].to(torch.int32)
    if window:
        starts = torch.minimum(torch.maximum(starts, ends - window + 1), ends)
    tile_begins = torch.arange(0, tokens, TILE, dtype=torch.int32, device=device)
    tile_ends = torch.clamp(tile_begins + TILE, max=tokens)
    first = torch.searchsorted(ends, tile_begins, right=True, out_int32=True)
    last = torch.searchsorted(starts, tile_ends, right=False, out_int32=True)
    positions, step = anchors.numel() * block_size, item_positions(group)
    begins = torch.arange(0, positions, step, device=device)
    lasts = torch.clamp(begins + step, max=positions) - 1
    keys = ends[lasts // block_size] - starts[begins // block_size]
    order = _heaviest_first((keys + TILE - 1) // TILE)
    tile_order = _heaviest_first((last - first).long() * MAX_WEIGHT // max(anchors.numel(), 1))
    return starts, ends, torch.stack([first, last], dim=1), order, tile_order


def _heaviest_first(weights: Tensor) -> Tensor:
    return torch.argsort(weights.clamp(max=MAX_WEIGHT), descending=True, stable=True).to(torch.int32)


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
    backend: "auto" picks the fastest there is for the device; "cpu" is the C++ operator (float32, bfloat16 with float32
    arithmetic, float64; bitwise repeatable, whatever the number of threads); "reference" is plain torch with a dense
    mask, for any device and floating dtype, in O(A * S * Hq * T) memory.

    Returns (A*S, Hq, D) in the dtype of q. Raises ValueError for tensors that do not fit each other or the plan, and
    for a backend that cannot run them: it never falls back silently.
    """
    _check_tensors(q, k_ctx, v_ctx, k_blk, v_blk, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _resolve(backend, q) == "reference":
        return _attention_reference(q, k_ctx, v_ctx, k_blk, v_blk, plan, scale)
    tensors = [tensor.contiguous() for tensor in (q, k_ctx, v_ctx, k_blk, v_blk)]
    indices = (plan.starts, plan.ends, plan.tile_ranges, plan.order, plan.tile_order)
    out, _ = torch.ops.dflash_scale.anchor_attention(
        *tensors, *indices, plan.block_size, plan.window or 0, plan.causal_block, scale, 0
    )
    return out


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


def _resolve(backend: str, q: Tensor) -> str:
    """The backend that runs: "cpu" or "reference"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    device = q.device.type
    if backend == "auto" and device == "cuda":
        if not torch.compiler.is_compiling():
            _say_reference_on_cuda()
        return "reference"
    if backend == "reference":
        return "reference"
    if device != "cpu":
        raise ValueError(f'backend "{backend}" needs CPU tensors, got {q.device}; use backend="reference".')
    if MISSING:
        raise ValueError(
            f'attention backend "{backend}" needs the compiled operators, but {MISSING}; run `pip install -e .` in the '
            'repository, or use backend="reference".'
        )
    if q.dtype not in CPU_DTYPES:
        raise ValueError(
            f'backend "{backend}" on the CPU takes float32, bfloat16 and float64, got {q.dtype}; '
            'use backend="reference".'
        )
    return "cpu"


@functools.cache
def _say_reference_on_cuda() -> None:
    log.warning("attention on CUDA runs the plain-torch reference: there is no CUDA attention kernel in this build.")


def visible_context(plan: Plan) -> Tensor:
    """The context mask of the definition, (A, S, T) bool; what the plan's intervals stand for."""
    anchor = plan.anchors.long()[:, None, None]
    slot = torch.arange(plan.block_size, device=anchor.device)[None, :, None]
    position = torch.arange(plan.doc_ids.numel(), device=anchor.device)[None, None, :]
    same_document = (plan.doc_ids[None, :] == plan.doc_ids[plan.anchors][:, None])[:, None, :]
    seen = same_document & (position < anchor)
    if plan.window is None:
        return seen.expand(-1, plan.block_size, -1)
    return seen & (position > anchor + slot - plan.window)


def visible_block(plan: Plan) -> Tensor:
    """The mask inside a block, (S, S) bool: query slot, key slot."""
    slot = torch.arange(plan.block_size, device=plan.anchors.device)
    back = slot[:, None] - slot[None, :]
    seen = torch.ones_like(back, dtype=torch.bool)
    if plan.causal_block:
        seen = back >= 0
    if plan.window is not None:
        seen = seen & (back < plan.window)
    return seen


def _attention_reference(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_blk: Tensor, v_blk: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Softmax attention under the dense mask; half precisions are computed in float32."""
    anchors, size, tokens = plan.anchors.numel(), plan.block_size, plan.doc_ids.numel()
    heads, key_heads, width = q.shape[1], k_ctx.shape[1], q.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(compute).view(anchors, size, key_heads, heads // key_heads, width)
    blocks_k, blocks_v = (x.to(compute).view(anchors, size, key_heads, width) for x in (k_blk, v_blk))
    scores = torch.cat(
        [
            torch.einsum("ashgd,thd->ashgt", queries, k_ctx.to(compute)),
            torch.einsum("ashgd,ajhd->ashgj", queries, blocks_k),
        ],
        dim=-1,
    )
    seen = torch.cat([visible_context(plan), visible_block(plan).expand(anchors, -1, -1)], dim=-1)
    scores = (scores * scale).masked_fill(~seen[:, :, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    out = torch.einsum("ashgt,thd->ashgd", weights[..., :tokens], v_ctx.to(compute))
    out = out + torch.einsum("ashgj,ajhd->ashgd", weights[..., tokens:], blocks_v)
    return out.reshape(anchors * size, heads, width).to(q.dtype)


def _fake_plan(
    anchors: Tensor, doc_ids: Tensor, block_size: int, window: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tiles, step = (doc_ids.shape[0] + TILE - 1) // TILE, item_positions(group)
    items = (anchors.shape[0] * block_size + step - 1) // step
    starts, ends = torch.empty_like(anchors), torch.empty_like(anchors)
    return starts, ends, anchors.new_empty(tiles, 2), anchors.new_empty(items), anchors.new_empty(tiles)


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
    torch.library.register_fake("dflash_scale::build_plan", _fake_plan)
    torch.library.register_fake("dflash_scale::anchor_attention", _fake_forward)
    torch.library.register_fake("dflash_scale::anchor_attention_backward", _fake_backward)
    torch.library.register_autograd("dflash_scale::anchor_attention", _backward, setup_context=_setup_context)
