"""What a person sees of a run: one progress line that names the bottleneck, and two plots."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Above this share of waiting hidden states hold the training up; below it they are ahead of it.
DATA_BOUND = 0.15
# Where they come from, by stream.mode.
SOURCES = {"online": "servers", "offline": "cache", "hybrid": "servers or cache", "fake": "random states"}


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


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind (train or validation) of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def plot_training(metrics: Path, out: Path) -> None:
    """Loss and acceptance length over steps, training and held out, as a PNG."""
    train, held_out = read_metrics(metrics, "train"), read_metrics(metrics, "validation")
    figure, axes = _figure(2)
    for axis, name, label in zip(
        axes, ("loss", "acceptance_length"), ("loss", "acceptance length (tokens)"), strict=True
    ):
        axis.plot([m["step"] for m in train], [m[name] for m in train], label="training")
        axis.plot([m["step"] for m in held_out], [m[name] for m in held_out], "o-", label="held out")
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=120)


def plot_acceptance(by_position: dict[str, list[float]], out: Path) -> None:
    """Acceptance by position (share of drafts accepted at slots 1..S-1), one line per name, as a PNG."""
    figure, (axis,) = _figure(1)
    for name, shares in by_position.items():
        axis.plot(range(1, len(shares) + 1), shares, "o-", label=name)
    axis.set(xlabel="slot", ylabel="share accepted", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out, dpi=120)


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]
