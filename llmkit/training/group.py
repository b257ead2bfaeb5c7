"""The process group of a run in several processes, opened once and in one place, with the recipe's time-out."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from llmkit.context import RunContext
from llmkit.errors import UsageError


def open_group(ctx: RunContext, timeout_minutes: float) -> None:
    """NCCL on GPUs, each process on its own; gloo on CPUs. Does nothing for one process, or in a group that is open.

    accelerate and DeepSpeed take the group that they find; accelerate's own would wait half an hour on a CPU, whatever
    it is told. Raises UsageError where there are fewer GPUs than processes.
    """
    if ctx.world_size == 1 or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        _take_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes))


def _take_device(number: int) -> None:
    devices = torch.cuda.device_count()
    if number >= devices:
        raise UsageError(
            f"launch.processes: process {number} has no GPU of its own, {devices} can be seen on this machine "
            "(CUDA_VISIBLE_DEVICES chooses). Start as many processes as there are GPUs: launch.processes: auto."
        )
    torch.cuda.set_device(number)
