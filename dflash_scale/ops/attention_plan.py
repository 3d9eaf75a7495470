"""The plan of the attention: which context each block sees, as intervals.

T tokens in a packed row · A anchors · S block size · G query heads per kv head

Documents are contiguous in a row and anchors ascend, so every block sees one interval of the context. The plan is those
intervals and the order of the work, O(A + T/128 + A*S*G/128) integers and no mask. It is built once per step and
window, and serves all layers, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dflash_scale.ops.library import COMPILED, MISSING

TILE = 128  # keys per tile of `Plan.tile_ranges`; kTile in csrc/attention/plan.h
MAX_WEIGHT = 1023  # work is ordered by weights up to here; kWeights - 1 there


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
    # What a backend made of the plan when it was first asked for, such as FlexAttention's block lists.
    derived: dict[str, Any] = field(default_factory=dict, repr=False)


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
    build = torch.ops.dflash_scale.build_plan if _compiled(anchors.device) else _plan_reference
    starts, ends, tile_ranges, order, tile_order = build(anchors, doc_ids, block_size, window or 0, group)
    return Plan(
        anchors=anchors,
        doc_ids=doc_ids,
        starts=starts,
        ends=ends,
        tile_ranges=tile_ranges,
        order=order,
        tile_order=tile_order,
        block_size=block_size,
        window=window,
        causal_block=causal_block,
        group=group,
    )


def _compiled(device: torch.device) -> bool:
    # The library holds no code for GPUs before compute capability 8.0.
    return COMPILED.get(device.type, False) and (
        device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8
    )


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


def _fake_plan(
    anchors: Tensor, doc_ids: Tensor, block_size: int, window: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tiles, step = (doc_ids.shape[0] + TILE - 1) // TILE, item_positions(group)
    items = (anchors.shape[0] * block_size + step - 1) // step
    starts, ends = torch.empty_like(anchors), torch.empty_like(anchors)
    return starts, ends, anchors.new_empty(tiles, 2), anchors.new_empty(items), anchors.new_empty(tiles)


if not MISSING:
    torch.library.register_fake("dflash_scale::build_plan", _fake_plan)
