"""How far an attention result is from the definition, and where: head, row, column and tile say which part of a kernel
is wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest error of one row of one head, as a share of that row's size (`row_errors`).
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 6e-3, torch.float32: 2e-3, torch.float64: 1e-10}
# Gradients of queries and keys are differences that may cancel to nothing; below this size they are not looked into.
FLOOR = {"dq": 0.2, "dk_ctx": 0.2, "dk_blk": 0.2}
UNIT, COLUMNS, TILE = 64, 16, 128  # query rows of a warpgroup, columns of a product's step, keys of a tile


def row_errors(name: str, got: Tensor, wanted: Tensor) -> Tensor:
    """Per (row, head): root mean square of the error over that of the row or of the whole tensor, the larger one.

    A number that is not finite makes its row's error infinite.
    """
    error = (got.double() - wanted.double()).square().mean(-1).sqrt()
    size = wanted.double().square().mean(-1).sqrt()
    whole = wanted.double().square().mean().sqrt().clamp(min=FLOOR.get(name, 1e-30))
    return (error / torch.maximum(size, whole)).nan_to_num(nan=float("inf"))


def where(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> dict[str, Any]:
    """Where (N, heads, D) is wrong: the worst row, how many rows are, and how the error lies over heads, over rows in a
    unit of 64, over columns by 16 and over tiles of 128 rows."""
    rows = row_errors(name, got, wanted)
    wrong = rows > tolerance
    row, head = divmod(int(rows.argmax()), rows.shape[1])
    error = (got.double() - wanted.double()).nan_to_num(nan=1e3, posinf=1e3, neginf=-1e3)
    column = int(error[row, head].abs().argmax())
    packed = error.transpose(0, 1).flatten(0, 1)  # rows of head 0, then of head 1
    columns = min(COLUMNS, packed.shape[1])
    return {
        "worst": {"row": row, "head": head, "column": column, "tile": row // TILE},
        "got, wanted": [got[row, head, column].item(), wanted[row, head, column].item()],
        "wrong rows": [int(wrong.sum()), wrong.numel()],
        "not finite": int((~torch.isfinite(got)).sum()),
        "by head": _sizes(error.square().mean((0, 2))),
        "by row in 64": _sizes(_padded(packed, UNIT).square().mean((0, 2))),
        "by 16 columns": _sizes(packed.square().mean(0).view(-1, columns).mean(1)),
        "by tile": _sizes(_padded(error.square().mean((1, 2))[:, None], TILE).mean((1, 2)))[:64],
    }


def _padded(x: Tensor, size: int) -> Tensor:
    """(N, C) -> (N / size rounded up, size, C)."""
    return F.pad(x, (0, 0, 0, -len(x) % size)).view(-1, size, x.shape[1])


def _sizes(squares: Tensor) -> list[float]:
    return [float(f"{x:.1e}") for x in squares.sqrt().tolist()]
