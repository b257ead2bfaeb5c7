"""A stage for tests in several processes: in every step all of them exchange a number, and one can come to grief."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

from llmkit.context import Result, RunContext
from llmkit.errors import DataError, StoppedEarly
from llmkit.recipe import Recipe as Base


class Recipe(Base):
    """Go round ``steps`` times."""

    several_processes: ClassVar[bool] = True

    steps: int = 4
    """Rounds."""
    pause: float = 0.0
    """Seconds a round takes."""
    fate: str = ""
    """What happens to a process, as RANK:STEP:HOW."""


def run(recipe: Recipe, ctx: RunContext) -> Result:
    import torch
    import torch.distributed as dist

    from llmkit.training.group import open_group

    open_group(ctx, recipe.launch.timeout_minutes)
    print(f"rank {ctx.rank} prints with {os.environ.get('OMP_NUM_THREADS')} threads", flush=True)
    print(f"rank {ctx.rank} writes to stderr", file=sys.stderr)
    (ctx.output_dir / f"pid-{ctx.rank}").write_text(str(os.getpid()))
    start = max((int(p.name.split("-")[1]) for p in _checkpoints(ctx)), default=0)
    if start and ctx.is_main:
        ctx.progress.note(f"Going on from checkpoint-{start}")
    for step in range(start + 1, recipe.steps + 1):
        time.sleep(recipe.pause)
        _meet_fate(recipe.fate, ctx.rank, step)
        flag = torch.tensor(int(ctx.stop.requested))
        dist.all_reduce(flag)
        ctx.progress.log(step, recipe.steps, {"loss": 1 / step})
        if ctx.is_main:
            (ctx.output_dir / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        dist.barrier()
        if flag:
            raise StoppedEarly(f"Stopped by {ctx.stop.reason} with a checkpoint at step {step}.")
    return Result("ring", recipe.name, ctx.output_dir, metrics={"steps": recipe.steps, "started_at": start})


def _checkpoints(ctx: RunContext) -> list[Path]:
    return list((ctx.output_dir / "checkpoints").glob("checkpoint-*"))


def _meet_fate(fate: str, rank: int, step: int) -> None:
    if not fate.startswith(f"{rank}:{step}:"):
        return
    how = fate.rpartition(":")[2]
    print(f"rank {rank} meets its fate: {how}", file=sys.stderr, flush=True)
    if how in ("KILL", "STOP", "SEGV"):
        os.kill(os.getpid(), getattr(signal, f"SIG{how}"))
        time.sleep(60)
    if how == "exit":
        os._exit(7)
    if how == "data":
        raise DataError("row 17 is broken")
    raise ValueError("nobody foresaw this")
