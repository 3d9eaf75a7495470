"""What a run tells of itself while it goes on: metrics.jsonl, TensorBoard, and the progress line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dflash_scale.ops.softmax_loss import TERMS
from dflash_scale.training.ledger import JsonLines
from dflash_scale.training.loss import TOP, BlockSums

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Above this share of waiting hidden states hold the training up; below it they are ahead of it.
DATA_BOUND = 0.15


# Where they come from, by stream.mode.
SOURCES = {"online": "servers", "offline": "cache", "hybrid": "servers or cache", "fake": "random states"}


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


def bottleneck(wait_data: float, source: str) -> str:
    """Which half limits the run, from the share of time in which the ranks waited for hidden states of `source`."""
    return source if wait_data > DATA_BOUND else "training"


class ProgressLine:
    """One line on a terminal; in a file or a pipe, one line per logged step. Only rank 0 shows it."""

    def __init__(self, total: int, done: int, source: str, *, enabled: bool) -> None:
        self._enabled, self._total, self._source, self._validated = enabled, total, source, ""
        terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if terminal else None

    def train(self, step: int, values: dict[str, Any]) -> None:
        text = (
            f"loss {values['loss']:.3f} · acceptance {values['acceptance_length']:.2f}{self._validated} · "
            f"{values['tokens_per_s']:,.0f} tok/s · wait_data {values['wait_data']:.0%} · "
            f"bottleneck: {bottleneck(values['wait_data'], self._source)}"
        )
        self._show(step, text)

    def validation(self, step: int, values: dict[str, Any]) -> None:
        self._validated = f" (held out {values['acceptance_length']:.2f})"
        if self._bar is None and self._enabled:
            print(f"step {step}/{self._total} · validation{self._validated}", file=sys.stderr, flush=True)

    def _show(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._enabled:
            print(f"step {step}/{self._total} · {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
