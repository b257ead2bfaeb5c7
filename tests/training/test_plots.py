"""The picture of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkit.training.plots import loss_curves

WHOLE: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-4},
    {"step": 2, "loss": 2.0, "learning_rate": 5e-5},
    {"step": 2, "eval_loss": 2.5, "eval_tokens": 10.0},
]


@pytest.mark.parametrize(
    "history", [WHOLE, WHOLE[:1], WHOLE[2:], []], ids=["whole", "one point", "held out only", "nothing"]
)
def test_a_png_whatever_there_is_to_draw(history: list[dict[str, Any]], tmp_path: Path) -> None:
    path = loss_curves(history, tmp_path / "loss.png", title="한국어 <run> $x$")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5_000


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen: list[Any] = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), real(self, *a, **k))[1])
    loss_curves(WHOLE, tmp_path / "loss.png", title="run")
    losses, rates = seen[0].axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.lines}
    assert drawn == {"training": ([1, 2], [3.0, 2.0]), "held out": ([2], [2.5])}
    assert list(rates.lines[0].get_ydata()) == [1e-4, 5e-5]
    assert losses.get_title() == "run"
