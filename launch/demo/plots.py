"""The demo's two plots, from metrics.jsonl and the acceptance by slot."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind (train or validation) of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def plot_training(metrics: Path, out: Path) -> None:
    """Loss and acceptance length over steps, training and validation, as a PNG."""
    train, held_out = read_metrics(metrics, "train"), read_metrics(metrics, "validation")
    figure, axes = _figure(2)
    for axis, name, label in zip(
        axes, ("loss", "acceptance_length"), ("loss", "acceptance length (tokens)"), strict=True
    ):
        axis.plot([m["step"] for m in train], [m[name] for m in train], label="training")
        axis.plot([m["step"] for m in held_out], [m[name] for m in held_out], "o-", label="validation")
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
