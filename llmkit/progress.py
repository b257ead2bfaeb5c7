"""What a person sees while a stage works: a live line on a terminal or in a notebook, plain lines in a log file.

All of it goes to stderr. ``step`` may be called after every training step: it draws ten times a second at most.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from llmkit.context import Progress, Task

if TYPE_CHECKING:
    from rich.console import Console

REDRAW_SECONDS = 0.1
NOTEBOOK_REDRAW_SECONDS = 0.5
PLAIN_TASK_SECONDS = 30.0

Clock = Callable[[], float]


def open_progress(*, rank: int = 0) -> AbstractContextManager[Progress]:
    """The progress display that suits where stderr goes; leaving it ends the live line."""
    if rank != 0:
        return silent()
    if in_notebook():
        return _notebook()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return _terminal()
    return _plain()


def in_notebook() -> bool:
    """True in a Jupyter kernel (not in IPython on a terminal)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def quiet_libraries() -> None:
    """Turn off the libraries' own progress bars and chatter, before they are imported; what the user set wins."""
    for key, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(key, value)
    # DeepSpeed, which accelerate imports where it is installed, warns of every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(_worth_saying)
    # bitsandbytes, which peft imports, misses a kernel for inference that llmkit does not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "Setting accelerator to CPU" not in message and "Failed to load CPU gemm_4bit_forward" not in message


# Numbers as text


def duration(seconds: float) -> str:
    """``42s``, ``3m07s``, ``2h05m``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def number(value: float) -> str:
    """Four digits that matter, large numbers with thousands separators."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


SHOWN: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "eval loss": ("eval_loss",),
    "lr": ("learning_rate", "lr"),
    "tokens/s": ("tokens_per_second", "tokens_per_second/non_padding", "tokens_per_second_non_padding"),
}
"""What the live line shows, each under the first of its names that a stage reports (``train/`` may stand before)."""


def headline(metrics: Mapping[str, float]) -> str:
    """The few metrics that fit on one line."""
    parts = []
    for label, names in SHOWN.items():
        value = next((metrics[p + n] for n in names for p in ("", "train/", "eval/") if p + n in metrics), None)
        if value is not None:
            parts.append(f"{label} {number(value)}")
    return "  ".join(parts)


class _Pace:
    """Time left, from the steps seen since the first call (a resumed run does not start at step 0)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def left(self, step: int, total: int) -> str:
        now = self._clock()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        done = step - self._first[0]
        if done == 0 or total <= 0:
            return ""
        return f"{duration((now - self._first[1]) / done * max(total - step, 0))} left"


class Silent:
    """Every rank but the first."""

    def note(self, text: str) -> None:
        return None

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        return None

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        return None

    @contextmanager
    def task(self, what: str, total: int | None = None, unit: str = "rows") -> Iterator[Task]:
        yield _SilentTask()


class _SilentTask:
    def advance(self, n: int = 1) -> None:
        return None


@contextmanager
def silent() -> Iterator[Progress]:
    yield Silent()


class Plain:
    """Lines for a log file or a job: no cursor movements, each line complete and flushed."""

    def __init__(self, clock: Clock = time.monotonic, write: Callable[[str], None] | None = None) -> None:
        self._clock = clock
        self._pace = _Pace(clock)
        self._write = write or _to_stderr
        self._logged = -1

    def note(self, text: str) -> None:
        self._write(text)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        # Sets the start of the pace, so that the first `log` can already say how much time is left.
        if self._pace._first is None:
            self._pace.left(step, total)

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        shown = headline(metrics)
        if not shown and step == self._logged:
            return  # a second call for the same step, with numbers that have no place on a line
        self._logged = step
        rest = "  ".join(p for p in (shown, self._pace.left(step, total)) if p)
        self._write(f"step {step}/{total}" + (f"  {rest}" if rest else ""))

    @contextmanager
    def task(self, what: str, total: int | None = None, unit: str = "rows") -> Iterator[Task]:
        size = f": {total:,} {unit}" if total is not None else ""
        self._write(f"{what}{size} …")
        task = _PlainTask(what, total, unit, self._clock, self._write)
        yield task
        self._write(f"{what}: done, {task.done:,} {unit} in {self._clock() - task.begin:.1f}s")


class _PlainTask:
    def __init__(self, what: str, total: int | None, unit: str, clock: Clock, write: Callable[[str], None]) -> None:
        self.what, self.total, self.unit, self.clock, self.write = what, total, unit, clock, write
        self.done = 0
        self.begin = self.said = clock()

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = self.clock()
        if now - self.said >= PLAIN_TASK_SECONDS:
            self.said = now
            of = f"/{self.total:,}" if self.total is not None else ""
            self.write(f"{self.what}: {self.done:,}{of} {self.unit}, {self.done / (now - self.begin):,.0f}/s")


@contextmanager
def _plain() -> Iterator[Progress]:
    yield Plain()


class Terminal:
    """One live line under the notes, drawn by rich."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._clock = clock
        self._pace = _Pace(clock)
        self._drawn = float("-inf")
        self._metrics: dict[str, float] = {}
        # auto_refresh would draw from a thread of its own, also while nothing changes.
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rest]}"),
            console=console,
            transient=True,
            auto_refresh=False,
        )
        self._training: Any = None

    def note(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        if now - self._drawn < REDRAW_SECONDS and step != total:
            return
        self._drawn = now
        self._metrics.update(metrics)
        self._show(step, total)

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._metrics.update(metrics)
        self._show(step, total)

    def _show(self, step: int, total: int) -> None:
        rest = "  ".join(p for p in (headline(self._metrics), self._pace.left(step, total)) if p)
        count = f"step {step}/{total}"
        if self._training is None:
            self._training = self.bars.add_task("training", total=total, completed=step, count=count, rest=rest)
        else:
            self.bars.update(self._training, total=total, completed=step, count=count, rest=rest)
        self.bars.refresh()

    @contextmanager
    def task(self, what: str, total: int | None = None, unit: str = "rows") -> Iterator[Task]:
        bar = _TerminalTask(self, what, total, unit, self._clock)
        try:
            yield bar
        finally:
            self.bars.remove_task(bar.id)
        self.note(f"{what}: {bar.done:,} {unit} in {self._clock() - bar.begin:.1f}s")


class _TerminalTask:
    def __init__(self, owner: Terminal, what: str, total: int | None, unit: str, clock: Clock) -> None:
        self.owner, self.total, self.unit, self.clock = owner, total, unit, clock
        self.done = 0
        self.begin = clock()
        self.drawn = float("-inf")
        self.id = owner.bars.add_task(what, total=total, count="", rest="")
        owner.bars.refresh()

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = self.clock()
        if now - self.drawn < REDRAW_SECONDS:
            return
        self.drawn = now
        rate = self.done / max(now - self.begin, 1e-9)
        of = f"/{self.total:,}" if self.total is not None else ""
        left = f"  {duration((self.total - self.done) / rate)} left" if self.total and rate and self.done else ""
        self.owner.bars.update(
            self.id, completed=self.done, count=f"{self.done:,}{of} {self.unit}", rest=f"{rate:,.0f}/s{left}"
        )
        self.owner.bars.refresh()


@contextmanager
def _terminal() -> Iterator[Progress]:
    from rich.console import Console

    display = Terminal(Console(stderr=True))
    with display.bars:
        yield display


class Notebook:
    """A line that is rewritten in the cell's output; IPython does it, so that no widget package is needed."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._pace = _Pace(clock)
        self._drawn = float("-inf")
        self._metrics: dict[str, float] = {}
        self._handle: Any = None

    def note(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        if now - self._drawn < NOTEBOOK_REDRAW_SECONDS and step != total:
            return
        self._drawn = now
        self._metrics.update(metrics)
        rest = "  ".join(p for p in (headline(self._metrics), self._pace.left(step, total)) if p)
        self._handle = _rewrite(self._handle, f"step {step}/{total}  {rest}")

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._drawn = float("-inf")
        self.step(step, total, metrics)

    @contextmanager
    def task(self, what: str, total: int | None = None, unit: str = "rows") -> Iterator[Task]:
        task = _NotebookTask(what, total, unit, self._clock)
        yield task
        task.handle = _rewrite(task.handle, f"{what}: {task.done:,} {unit} in {self._clock() - task.begin:.1f}s")


class _NotebookTask:
    def __init__(self, what: str, total: int | None, unit: str, clock: Clock) -> None:
        self.what, self.total, self.unit, self.clock = what, total, unit, clock
        self.done = 0
        self.begin = clock()
        self.drawn = self.begin
        self.handle: Any = None

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = self.clock()
        if now - self.drawn >= NOTEBOOK_REDRAW_SECONDS:
            self.drawn = now
            of = f"/{self.total:,}" if self.total is not None else ""
            self.handle = _rewrite(self.handle, f"{self.what}: {self.done:,}{of} {self.unit}")


def _rewrite(handle: Any, text: str) -> Any:
    from IPython.display import display

    data = {"text/plain": text}
    if handle is None:
        return display(data, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    handle.update(data, raw=True)
    return handle


@contextmanager
def _notebook() -> Iterator[Progress]:
    yield Notebook()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
