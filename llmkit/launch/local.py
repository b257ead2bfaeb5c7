"""The launcher of this machine: a run in this very process, or in several that this one starts and watches.

A process that has its rank already (torchrun, accelerate, DeepSpeed or llmkit itself started it) runs its part. One process
whose memory is limited (a container, a Slurm job, ``ulimit -v``) is watched by the command line too: when the system
kills it, someone is left to say so.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace

from llmkit import launch, runner
from llmkit.context import Result
from llmkit.errors import UsageError
from llmkit.launch.job import Job, Resources
from llmkit.processes import limits, local
from llmkit.progress import open_progress
from llmkit.ranks import Ranks, launcher
from llmkit.recipe import LaunchSettings, Recipe


def resources(recipe: Recipe) -> Resources:
    """What is to be started: one process where this one is a rank already. ``UsageError`` for another number of ranks
    than the recipe asks for."""
    settings = recipe.launch
    if _is_a_rank():
        _check_number(settings)
        return Resources()
    if settings.processes == "auto":
        return Resources(processes_per_node=max(1, limits.visible_devices() if recipe.several_processes else 1))
    return Resources(processes_per_node=settings.processes)


def _is_a_rank() -> bool:
    return launcher() is not None or Ranks.from_environment().world_size > 1


def _check_number(settings: LaunchSettings) -> None:
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if launcher() is None and settings.processes != "auto" and here not in (None, str(settings.processes)):
        raise UsageError(
            f"launch.processes is {settings.processes}, but this is one of {here} processes on this machine "
            f"(LOCAL_WORLD_SIZE). Start {settings.processes}, or set launch.processes: auto."
        )


def render(job: Job) -> str:
    """The command line that does the same from a shell in ``job.cwd``, quoted for it."""
    env = [f"{key}={shlex.quote(value)}" for key, value in job.env.items()]
    return " ".join([*env, shlex.join(job.argv)])


def describe(job: Job) -> str:
    """The processes that the command starts, in words."""
    count = job.resources.processes_per_node
    if count == 1:
        return "1"
    threads = local.threads_each(count)
    return f"{count} on this machine, {threads} thread{'s'[: threads != 1]} each (OMP_NUM_THREADS)"


def submit(job: Job, recipe: Recipe, stage: str, resume: str) -> Result:
    """Do what ``job.argv`` says, and give back the result. Raises the classes of ``llmkit.errors``."""
    count = job.resources.processes_per_node
    if _is_a_rank() or (count == 1 and not (launch.PROGRAM and limits.memory_limit())):
        return runner.run(recipe, stage, resume)
    folder = runner.folder_of(recipe)
    with (
        local.Asked().listening() as asked,
        runner.understood(folder),
        runner.claimed(recipe, stage, resume) as prepared,
    ):
        if prepared.finding.result is not None and prepared.finding.state == "done":
            _say(f"{prepared.uri or folder}: {prepared.finding.why}")
            return replace(prepared.finding.result, output_dir=folder, uri=prepared.uri)
        if prepared.finding.state == "set_aside":
            _say(prepared.finding.why)
        if count > 1:
            _say(f"Processes: {describe(job)}; what the others than rank 0 write is in {folder / 'logs'}")
        asked.refuse_to_begin()
        # The old folder was set aside here already: its processes must not do it again.
        rest = ["--resume", "auto" if resume == "never" else prepared.resume]
        program = launch.PROGRAM or [sys.executable, "-m", "llmkit"]
        return local.run(replace(job, argv=(*program, *job.argv[1:], *rest)), prepared, asked)


def _say(text: str) -> None:
    with open_progress() as progress:
        progress.note(text)
