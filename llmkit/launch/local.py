"""The launcher that runs a stage in this very process."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TypeVar

from llmkit.errors import UsageError
from llmkit.launch.job import Job, Resources

T = TypeVar("T")


def render(job: Job) -> str:
    """The command line that does the same from a shell in ``job.cwd``, quoted for it."""
    env = [f"{key}={shlex.quote(value)}" for key, value in job.env.items()]
    return " ".join([*env, shlex.join(job.argv)])


def submit(job: Job, in_process: Callable[[], T]) -> T:
    """Run ``in_process``, which does what ``job.argv`` would, and give back what it returns.

    ``UsageError`` where the job asks for more than this one process.
    """
    if job.resources != Resources():
        raise UsageError(
            f"The local launcher runs one process, not {job.resources.nodes} nodes with "
            f"{job.resources.processes_per_node} processes each. Start them with: "
            f"torchrun --nproc-per-node {job.resources.processes_per_node} -m {shlex.join(job.argv)}"
        )
    return in_process()
