"""DeepSpeed ZeRO 1, 2 and 3: the engine around a model, and what a run needs before there is one.

The engine is built here and not by accelerate, which falls back on training without DeepSpeed when it sees a CPU, and
leaves switches behind that change how models load. Optimizer, learning rates, loss and the order of the data stay the
trainer's own, so that a step is the one that a process alone would take.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmkit.context import RunContext
from llmkit.errors import LlmkitError, MissingError, UsageError
from llmkit.training import zero_config
from llmkit.training.sharding import parameter_types, saved_buffers
from llmkit.training.zero_config import Config, offload, stage_of

FILE = "deepspeed.json"


class Zero:
    """A run under ZeRO; see :class:`llmkit.training.sharding.Shards`. ``config`` is resolved, without ``auto``."""

    def __init__(self, config: Config, ctx: RunContext) -> None:
        self.config, self._ctx = config, ctx
        self.stage = int(stage_of(config) or 0)
        self.name = f"zero{self.stage}"
        self.partitioned = self.stage == 3
        self.engine: Any = None
        self._types: dict[str, torch.dtype] = {}

    def wrap(
        self, model: Any, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> tuple[Any, torch.optim.Optimizer]:
        deepspeed = load_deepspeed()
        config = zero_config.for_engine(self.config)
        self._types = self._types or parameter_types(model)
        if lower := _lower_type(config):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(lower)
        if self.partitioned:
            # Parameter by parameter: the engine itself would move the whole model to the device first.
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        optimizer = _optimizer(self.config, make_optimizer(), self._ctx)
        try:
            self.engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        except (ValueError, AssertionError, deepspeed.runtime.zero.utils.ZeRORuntimeException) as error:
            raise UsageError(f"deepspeed: DeepSpeed refuses this configuration: {error}") from error
        self._check()
        self.engine.no_sync = nullcontext  # accumulation is told by the boundary: see backward
        return self.engine, optimizer

    def _check(self) -> None:
        """DeepSpeed has ways to train without what was asked for; a run that says ZeRO is ZeRO."""
        kind, stage = type(self.engine).__name__, self.engine.zero_optimization_stage()
        if kind != "DeepSpeedEngine" or stage != self.stage:
            raise LlmkitError(f"DeepSpeed made a {kind} of stage {stage} instead of an engine of stage {self.stage}")

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def norm(self, most: float) -> float:
        """The engine clips, steps and knows the norm in one go; steps with gradients that are not finite are skipped."""
        self.engine.step()
        found = self.engine.get_global_grad_norm()
        return float(found) if found is not None else 0.0

    def step(self) -> bool:
        return bool(self.engine.was_step_applied())

    def save(self, folder: Path) -> None:
        frozen = any(not p.requires_grad for p in self.engine.module.parameters())
        self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=frozen)
        if self._ctx.is_main:
            for script in folder.glob("zero_to_*.py"):  # llmkit export-weights does what they do
                script.unlink()

    def load(self, folder: Path) -> None:
        frozen = any(not p.requires_grad for p in self.engine.module.parameters())
        path, _ = self.engine.load_checkpoint(str(folder), load_module_strict=not frozen)
        if path is None:
            raise MissingError(f"{folder} holds no DeepSpeed checkpoint that this run can go on from.")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        deepspeed = load_deepspeed()
        for name, parameter in self.engine.module.named_parameters():
            kind = self._types[name]
            # Trained weights come from the optimizer's float32 copy, which is what the training has moved.
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if full is not None:
                yield from self._mine(name, full, kind)
                continue
            with deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
                yield from self._mine(name, parameter.data, kind)
        for name, buffer in saved_buffers(self.engine.module):
            yield from self._mine(name, buffer, buffer.dtype)

    def close(self) -> None:
        """The weights are out: what lay on a disk for them can go."""
        dist.barrier()
        if self._ctx.is_main:
            shutil.rmtree(self._ctx.output_dir / zero_config.SWAP, ignore_errors=True)

    def _mine(self, name: str, tensor: Tensor, kind: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        if self._ctx.is_main:
            yield name, tensor.detach().to("cpu", kind, copy=True)


def load_deepspeed() -> Any:
    """The package, quiet, on the accelerator that torch sees. Raises MissingError where it is not installed."""
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        raise MissingError.extra("deepspeed", "train") from error
    logger = importlib.import_module("deepspeed.utils").logger
    logger.setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by names that this torch has a newer name for.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not dist.is_initialized():
        return deepspeed
    # Collectives in shared memory between processes on CPUs: a minute of compiling for what gloo does as well.
    ops = importlib.import_module("deepspeed.ops")
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _lower_type(config: Config) -> torch.dtype | None:
    if config["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if config["fp16"]["enabled"] else None


def _optimizer(config: Config, ours: torch.optim.Optimizer, ctx: RunContext) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for states in host memory, where it can be had; else the trainer's own."""
    wanted = config.get("zero_force_ds_cpu_optimizer")
    torch_adam = (config.get("optimizer") or {}).get("params", {}).get("torch_adam")
    if (
        offload(config, "optimizer") == "none"
        or wanted is False
        or torch_adam
        or not isinstance(ours, torch.optim.AdamW)
    ):
        return ours
    try:
        _check_compiler("DeepSpeed's optimizer for offloaded states")
        ctx.progress.note("Loading DeepSpeed's CPU optimizer (compiled once on a machine, which takes a minute or two)")
        adam: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        return adam(ours.param_groups, adamw_mode=True)  # type: ignore[no-any-return]
    except (MissingError, RuntimeError, OSError, ImportError) as error:
        if wanted:
            raise MissingError(
                f"deepspeed: zero_force_ds_cpu_optimizer is true, but it cannot be built here: {error}"
            ) from error
        ctx.progress.note(f"Offloaded states are updated by torch's AdamW: {str(error).splitlines()[0]}")
        return ours


def _check_compiler(what: str) -> None:
    if not (shutil.which("g++") or shutil.which("c++")):
        raise MissingError(f"{what} needs a C++ compiler, and none was found (Debian and Ubuntu: apt-get install g++)")
    if not shutil.which("ninja"):
        raise MissingError(f"{what} needs ninja, and it was not found: pip install ninja")


def check_nvme(config: Config) -> None:
    """Raises MissingError with the command that helps, where asynchronous reads and writes cannot be built."""
    if "nvme" not in (offload(config, "optimizer"), offload(config, "param")):
        return
    load_deepspeed()
    _check_compiler("Offload to NVMe")
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise MissingError(
            "deepspeed: offload to NVMe needs the headers of libaio, which are not here. "
            "Debian and Ubuntu: apt-get install libaio-dev; Fedora: dnf install libaio-devel."
        )
    try:
        builder.load(verbose=False)
    except Exception as error:
        said = [line.strip() for line in str(error).splitlines() if "error:" in line] or [type(error).__name__]
        raise MissingError(
            f"deepspeed: the part for offload to NVMe could not be compiled here: {said[0][:300]}\n"
            "What it needs on Debian and Ubuntu: apt-get install g++ libaio-dev. What was half compiled lies in"
            " ~/.cache/torch_extensions and can be removed."
        ) from error


def write_config(config: Config, ctx: RunContext) -> None:
    """``deepspeed.json`` of the run, as it is run; refuses to go on where a file was changed since the run began."""
    path = ctx.output_dir / FILE
    text = json.dumps(config, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UsageError(
            f"{path} is how this run began, and the DeepSpeed configuration is another one now. Put the old one back,"
            " or start anew with --resume never."
        )
    if ctx.is_main:
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        ctx.tracker.artifact(path)
