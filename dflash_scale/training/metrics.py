"""What a run tells of itself while it goes on: metrics.jsonl, TensorBoard, and the progress line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dflash_scale.training.ledger import JsonLines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DATA_BOUND = 0.15  # share of waiting above which a run is bound by its hidden states, not by the training
# Where hidden states come from, by stream.mode.
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


def bottleneck(wait_data: float, source: str) -> str:
    """Which half limits the run, from the share of time in which the ranks waited for hidden states of `source`."""
    return source if wait_data > DATA_BOUND else "training"


class ProgressLine:
    """One line on a terminal; in a file or a pipe, one line per logged step. Only rank 0 shows it."""

    def __init__(self, total: int, done: int, source: str, *, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total
        self._source = source
        self._validated = ""
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
        self._validated = f" (validation {values['acceptance_length']:.2f})"
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
