"""What a person sees: throttled live lines, plain lines in logs, silence on other ranks."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmkit import progress
from llmkit.context import Progress
from llmkit.progress import Notebook, Plain, Silent, Terminal, duration, headline, number, open_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (360000, "100h00m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23456, "1.235"), (2e-5, "2e-05"), (12345.6, "12,346"), (150.0, "150"), (0.0, "0"), (float("nan"), "nan"),
     (float("inf"), "inf"), (-0.5, "-0.5")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_headline_takes_the_known_metrics_under_any_prefix() -> None:
    assert headline({"train/loss": 1.5, "learning_rate": 2e-5, "grad_norm": 3.0}) == "loss 1.5  lr 2e-05"
    assert headline({}) == ""


def test_plain_writes_one_line_per_log_and_none_per_step() -> None:
    clock, lines = Clock(), []
    plain = Plain(clock, lines.append)
    for step in range(1, 21):
        clock.now += 2
        plain.step(step, 20, {"loss": 1.0})
        if step % 10 == 0:
            plain.log(step, 20, {"loss": 1.0, "learning_rate": 1e-4})
    assert lines == ["step 10/20  loss 1  lr 0.0001  20s left", "step 20/20  loss 1  lr 0.0001  0s left"]


def test_plain_task_speaks_at_both_ends_and_every_half_minute() -> None:
    clock, lines = Clock(), []
    with Plain(clock, lines.append).task("tokenizing", 100, "rows") as task:
        for _ in range(10):
            clock.now += 7
            task.advance(10)
    assert lines == [
        "tokenizing: 100 rows …",
        "tokenizing: 50/100 rows, 1/s",
        "tokenizing: 100/100 rows, 1/s",
        "tokenizing: done, 100 rows in 70.0s",
    ]


def test_a_resumed_run_estimates_from_its_own_steps() -> None:
    clock, lines = Clock(), []
    plain = Plain(clock, lines.append)
    plain.step(501, 600, {})
    clock.now += 10
    plain.step(511, 600, {})
    plain.log(511, 600, {})
    assert lines == ["step 511/600  1m29s left"]


def test_an_error_in_a_task_passes_through() -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match="row"), Plain(Clock(), lines.append).task("x"):
        raise ValueError("row")
    assert lines == ["x …"]


def terminal(clock: Clock) -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    return Terminal(Console(file=out, force_terminal=True, width=160, color_system=None), clock), out


def test_terminal_draws_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    display, _ = terminal(clock)
    drawn: list[float] = []
    monkeypatch.setattr(display.bars, "refresh", lambda: drawn.append(clock.now))
    for step in range(1, 1001):
        clock.now += 0.01
        display.step(step, 1000, {"loss": 1.0})
    assert 90 <= len(drawn) <= 102


def test_terminal_shows_step_loss_rate_and_time_left() -> None:
    clock = Clock()
    display, out = terminal(clock)
    with display.bars:
        for step in (1, 2, 3):
            clock.now += 60
            display.step(step, 10, {"loss": 2.5, "tokens_per_second": 273.0})
        display.log(3, 10, {"learning_rate": 1e-5})
        display.note("[not markup]")
        with display.task("packing", 10) as task:
            clock.now += 1
            task.advance(10)
    text = out.getvalue()
    for part in ("step 3/10", "loss 2.5", "tokens/s 273", "7m00s left", "[not markup]", "packing: 10 rows", "lr 1e-05"):
        assert part in text


def test_a_step_costs_next_to_nothing() -> None:
    display, _ = terminal(Clock())
    display.step(1, 100_000, {"loss": 1.0})
    begin = time.perf_counter()
    for step in range(2, 10_002):
        display.step(step, 100_000, {"loss": 1.0})
    assert (time.perf_counter() - begin) / 10_000 < 50e-6


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with open_progress(rank=1) as shown:
        assert isinstance(shown, Silent)
        shown.note("x")
        shown.step(1, 2, {})
        shown.log(1, 2, {})
        with shown.task("x") as task:
            task.advance()
    assert capfd.readouterr() == ("", "")


def test_a_log_file_gets_plain_lines_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with open_progress() as shown:
        shown.note("decided")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "decided\n")


def test_a_terminal_gets_the_live_line(tmp_path: Path) -> None:
    """Through a real pseudo-terminal."""
    code = (
        "from llmkit.progress import open_progress, Terminal\n"
        "with open_progress() as p:\n"
        "    assert isinstance(p, Terminal)\n"
        "    p.note('decided'); p.step(1, 2, {'loss': 1.0})\n"
    )
    primary, secondary = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], stdout=secondary, stderr=secondary, timeout=60, env=env)
    os.close(secondary)
    text = os.read(primary, 65536).decode()
    os.close(primary)
    assert done.returncode == 0, text
    assert "decided" in text
    assert "step 1/2" in text


def test_notebook_rewrites_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock, shown = Clock(), []

    def rewrite(handle: Any, text: str) -> str:
        shown.append((handle, text))
        return handle or f"handle of {text}"

    monkeypatch.setattr(progress, "_rewrite", rewrite)
    display: Progress = Notebook(clock)
    display.note("decided")
    for step in range(1, 11):
        clock.now += 0.2
        display.step(step, 10, {"loss": 1.0})
    display.log(10, 10, {"loss": 1.0})
    handles = {handle for handle, _ in shown[1:]}
    assert len(handles) == 1
    assert shown[0][0] is None
    assert len(shown) <= 7
    assert "step 10/10" in shown[-1][1]
    with display.task("packing", 10) as task:
        task.advance(10)
    assert "packing: 10 rows" in shown[-1][1]
    assert capsys.readouterr().out == "decided\n"


def test_quiet_libraries_leaves_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    progress.quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
