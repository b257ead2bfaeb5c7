"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def loss_curves(history: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """Training loss, held-out loss and learning rate over the steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _line(losses, history, "loss", "training", marker=None)
    _line(losses, history, "eval_loss", "held out", marker="o")
    losses.set_ylabel("loss (nats per token)")
    losses.set_title(title)
    if losses.lines:
        losses.legend()
    _line(rates, history, "learning_rate", "learning rate", marker=None)
    rates.set_xlabel("step")
    rates.set_ylabel("learning rate")
    for axis in (losses, rates):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _line(axis: Any, history: Sequence[dict[str, Any]], key: str, label: str, *, marker: str | None) -> None:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.5, markersize=4)
