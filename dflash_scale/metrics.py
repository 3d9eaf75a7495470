"""What a run writes down: scalars as JSON lines and for TensorBoard, and the ledger of samples trained.

Both are append-only files of one JSON object a line with a `step`. A resumed run first drops the lines of steps that
its checkpoint does not hold, so that a file never counts a step twice.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflash_scale.loss import TOP, BlockSums
from dflash_scale.ops.softmax_loss import TERMS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of later steps than `step`, and a last line that a kill cut short; written aside and renamed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            known = json.loads(line)["step"] <= step
        except json.JSONDecodeError:
            known = False
        if known:
            kept.append(line + "\n")
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept))
    os.replace(aside, path)


class JsonLines:
    """Appends one object a line; a line is complete or absent after a kill of the writer."""

    def __init__(self, path: Path, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(path, first_step - 1)
        self.path = path
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


class Metrics:
    """Scalars of one run, written by rank 0: `metrics.jsonl`, and TensorBoard's files beside it."""

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        self._lines = JsonLines(folder / "metrics.jsonl", first_step)
        self._board: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds, and a package that few kernels' machines have

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """kind: train or validation. Lists are kept in the JSON line only."""
        self._lines.write({"kind": kind, "step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()


def block_metrics(sums: BlockSums, normaliser: float) -> dict[str, Any]:
    """Means of reduced sums.

    Returns:
        loss, and each term that is in it, unweighted: ce, kl, reverse_kl, tv · accuracy (of trained slots) · top_4 and
        top_8, labels among the drafter's 4 and 8 best tokens · acceptance_length (tokens: mean leading correct run of a
        block, + 1) · accuracy_by_position and acceptance_by_position, lists over slots 1..S-1 · blocks ·
        verifier_agreement, the share of labels that are the verifier's argmax, where they were compared.
    """
    blocks = max(float(sums.blocks), 1.0)
    trained = sums.trained.clamp(min=1)
    slots = float(sums.trained.sum().clamp(min=1))
    terms = zip([term.name for term in TERMS], sums.terms.tolist(), strict=True)
    agreement = {"verifier_agreement": float(sums.agreed / sums.compared)} if sums.compared > 0 else {}
    return {
        "loss": float(sums.loss) / max(normaliser, 1e-12),
        **{name: total / max(normaliser, 1e-12) for name, total in terms if total},
        "accuracy": float(sums.correct.sum()) / slots,
        **{f"top_{k}": hits / slots for k, hits in zip(TOP, sums.top.tolist(), strict=True)},
        "acceptance_length": 1.0 + float(sums.accepted.sum()) / blocks,
        "accuracy_by_position": (sums.correct / trained).tolist(),
        "acceptance_by_position": (sums.accepted / blocks).tolist(),
        "blocks": int(sums.blocks),
        **agreement,
    }
