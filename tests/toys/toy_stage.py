"""A stage for tests: it counts steps, keeps the count in a checkpoint, and can end in every way a stage can end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import ClassVar

from llmkit.context import Result, RunContext
from llmkit.data.settings import DataSettings
from llmkit.errors import DataError, GateError, MissingError, StoppedEarly
from llmkit.recipe import Recipe as Base


class Recipe(Base):
    """Count to ``steps``."""

    several_processes: ClassVar[bool] = True

    steps: int = 3
    """Steps to count."""
    pause: float = 0.0
    """Seconds a step takes."""
    end: str = "done"
    """How it ends."""
    data: DataSettings | None = None
    """Inputs, whose digests the runner keeps."""


def run(recipe: Recipe, ctx: RunContext) -> Result:
    start = _last(ctx)
    print("a library prints to stdout")
    os.system("echo a child process prints to stdout")  # ignores SIGINT while it lasts
    (ctx.output_dir / f"seen-by-{ctx.rank}").touch()
    for step in range(start + 1, recipe.steps + 1):
        ctx.tracker.metrics({"loss": 1 / step}, step=step)
        ctx.progress.step(step, recipe.steps, {"loss": 1 / step})
        ctx.progress.log(step, recipe.steps, {"loss": 1 / step})
        time.sleep(recipe.pause)
        if ctx.stop.requested:
            _save(ctx, step)
            raise StoppedEarly(f"Stopped by {ctx.stop.reason} with a checkpoint at step {step}.")
    _end(recipe.end, ctx)
    (ctx.output_dir / "model").mkdir(exist_ok=True)
    (ctx.output_dir / "model" / "config.json").write_text("{}")
    return Result(
        stage="toy", name=recipe.name, output_dir=ctx.output_dir, metrics={"steps": recipe.steps, "started_at": start},
        artifacts={"model": "model"},
        samples=[{"prompt": "p?", "reference": "r", "before": "b", "after": "a"}],
    )  # fmt: skip


def _end(how: str, ctx: RunContext) -> None:
    if how == "data":
        raise DataError("rows 1, 2 and 3 are empty")
    if how == "gate":
        raise GateError("loss 2.0 is above the bound 1.0")
    if how == "memory":
        raise MemoryError("Unable to allocate 9 PiB")
    if how == "torch_memory":
        kind = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
        raise kind("CUDA out of memory. Tried to allocate 9 PiB")
    if how == "disk":
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)
    if how == "missing":
        import presidio_analyzer  # noqa: F401  not installed where the tests run
    if how == "secret":
        raise MissingError("https://me:s3cr3tpw@host/rows.jsonl cannot be reached")
    if how == "bug":
        json.loads("{'secret of the bug")
    if how == "interrupt":
        raise KeyboardInterrupt


def _last(ctx: RunContext) -> int:
    folder = Path(ctx.resume) if ctx.resume not in ("auto", "never") else None
    found = [folder] if folder else list((ctx.output_dir / "checkpoints").glob("checkpoint-*"))
    return max((int((f / "step").read_text()) for f in found), default=0)


def _save(ctx: RunContext, step: int) -> None:
    folder = ctx.output_dir / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "step").write_text(str(step))
