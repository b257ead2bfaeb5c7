"""DeepSpeed's configuration: the presets, what the recipe fills in, and whatever the two disagree about.

Nothing here needs torch or DeepSpeed, so a recipe is checked before anything is loaded. The presets of this module are
the source of ``recipes/deepspeed/*.json`` (``python -m llmkit.training.zero_config recipes/deepspeed`` writes them).
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import MissingError, UsageError

if TYPE_CHECKING:
    from llmkit.training.settings import TrainSettings

Config = dict[str, Any]
AUTO = "auto"
SWAP = "nvme_swap"
"""Folder of a run for what is offloaded to a disk."""

_BASE: Config = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "bf16": {"enabled": AUTO},
    "fp16": {"enabled": AUTO},
}
_BUCKETS: Config = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": AUTO}
_STAGE3: Config = {
    "stage": 3,
    **_BUCKETS,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
}
_CPU: Config = {"device": "cpu", "pin_memory": True}
_NVME: Config = {"device": "nvme", "nvme_path": AUTO, "pin_memory": True, "buffer_count": 5}

_ZERO: dict[str, Config] = {
    "zero1": {"stage": 1, **_BUCKETS},
    "zero1_offload": {"stage": 1, **_BUCKETS, "offload_optimizer": _CPU},
    "zero2": {"stage": 2, **_BUCKETS},
    "zero2_offload": {"stage": 2, **_BUCKETS, "offload_optimizer": _CPU},
    "zero3": _STAGE3,
    "zero3_offload": {**_STAGE3, "offload_optimizer": _CPU, "offload_param": _CPU},
    "zero3_nvme": {**_STAGE3, "offload_optimizer": _NVME, "offload_param": {**_NVME, "buffer_size": AUTO}},
}
PRESETS = tuple(_ZERO)

_NOT_TOGETHER = "llmkit does not train this way: remove the block"
REFUSED: Mapping[str, str] = {
    "amp": "mixed precision is `train.bf16` or `train.fp16`: remove the block",
    "torch_autocast": "mixed precision is `train.bf16` or `train.fp16`: remove the block",
    "activation_checkpointing": "set `train.gradient_checkpointing: true` instead",
    "data_efficiency": _NOT_TOGETHER,
    "curriculum_learning": _NOT_TOGETHER,
    "progressive_layer_drop": _NOT_TOGETHER,
    "compression_training": _NOT_TOGETHER,
    "quantize_training": _NOT_TOGETHER,
    "sparse_attention": _NOT_TOGETHER,
    "hybrid_engine": _NOT_TOGETHER,
    "autotuning": "`llmkit plan` proposes settings: remove the block",
    "elasticity": _NOT_TOGETHER,
    "pipeline": _NOT_TOGETHER,
    "tensor_parallel": _NOT_TOGETHER,
    "sequence_parallel_size": _NOT_TOGETHER,
    "expert_parallel": _NOT_TOGETHER,
    "managed_gradient_accumulation": "llmkit says where a step ends: remove the key",
}
"""Blocks of DeepSpeed that would do nothing here, or something else than the recipe says."""

KNOWN = frozenset({
    *_BASE, "optimizer", "scheduler", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "aio", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients",
    "data_types", "steps_per_print", "wall_clock_breakdown", "dump_state", "flops_profiler", "comms_logger",
    "memory_breakdown", "checkpoint", "tensorboard", "wandb", "comet", "csv_monitor", "nebula", "disable_allgather",
    "seq_parallel_communication_data_type", "fp32_allreduce", "dataloader_drop_last", "load_universal_checkpoint",
    "use_node_local_storage", "graph_harvesting", "log_level", "compile", "zenflow", "timers", "keep_in_fp32_modules",
})  # fmt: skip

KNOWN_ZERO = frozenset({
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "offload_param", "offload_optimizer", "sub_group_size", "cpu_offload", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients",
    "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply",
    "log_trace_cache_warnings", "enable_sanity_checks", "leaf_module", "prefetch_bucket_size",
    "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance",
    "gather_16bit_weights_on_model_save", "module_granularity_threshold", "use_all_reduce_for_fetch_params",
    "allgather_sequential", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "stage3_gather_fp16_weights_on_model_save", "mics_shard_size", "mics_hierarchical_params_gather",
})  # fmt: skip

_ONLY_STAGE3 = frozenset({
    "offload_param", "cpu_offload_param", "sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "mics_shard_size",
    "mics_hierarchical_params_gather", "prefetch_bucket_size", "param_persistence_threshold",
    "model_persistence_threshold", "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save",
    "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential",
})  # fmt: skip

_OLD_KEYS = {
    "cpu_offload": "offload_optimizer: {device: cpu}",
    "cpu_offload_param": "offload_param: {device: cpu}",
    "cpu_offload_use_pin_memory": "offload_optimizer: {device: cpu, pin_memory: true}",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}


class Mistake(NamedTuple):
    """``key`` is dotted, in DeepSpeed's names."""

    key: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known when a run starts and not before; sizes in elements, ``steps`` None until the data is there.

    ``largest`` is the largest parameter, ``swap`` the folder for weights and states on NVMe where the file leaves it
    to us.
    """

    processes: int
    bf16: bool
    fp16: bool
    hidden_size: int
    largest: int
    steps: int | None
    warmup: int | None
    swap: Path


def preset(name: str) -> Config:
    """A new copy of a preset. KeyError for a name that is none of :data:`PRESETS`."""
    return copy.deepcopy({**_BASE, "zero_optimization": _ZERO[name]})


def is_path(value: str) -> bool:
    """Is the text of ``deepspeed:`` a path, and not the name of a preset?"""
    return value not in PRESETS and (value.endswith(".json") or "/" in value)


def name_mistake(value: str) -> str:
    """What is wrong with the text of ``deepspeed:``; empty when nothing is."""
    if value in PRESETS or is_path(value):
        return ""
    near = difflib.get_close_matches(value, PRESETS, n=1)
    return f"there is no preset {value!r}." + (f" Did you mean {near[0]}?" if near else "")


def read(setting: str | Mapping[str, Any]) -> Config:
    """The configuration that ``deepspeed:`` stands for, as written, with its ``auto`` values.

    Raises MissingError for a file that is not there, UsageError for one that is not a JSON object.
    """
    if not isinstance(setting, str):
        return copy.deepcopy(dict(setting))
    if setting in PRESETS:
        return preset(setting)
    path = Path(setting)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingError(f"deepspeed: {setting} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"deepspeed: {setting} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"deepspeed: {setting} holds no JSON object.")
    return found


def known_stage(setting: str | Mapping[str, Any] | None) -> int | None:
    """The ZeRO stage as far as it can be told without reading a file; None for no DeepSpeed, or a path."""
    if setting is None or (isinstance(setting, str) and setting not in PRESETS):
        return None
    return stage_of(read(setting))


def stage_of(config: Mapping[str, Any]) -> int | None:
    zero = config.get("zero_optimization")
    found = zero.get("stage") if isinstance(zero, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def offload(config: Mapping[str, Any], what: str) -> str:
    """Where ``optimizer`` or ``param`` is kept: ``none`` (the device itself), ``cpu`` or ``nvme``."""
    block = config.get("zero_optimization", {}).get(f"offload_{what}")
    return str(block.get("device", "none")) if isinstance(block, Mapping) else "none"


# What is wrong


def mistakes(config: Mapping[str, Any], train: TrainSettings, facts: Facts | None = None) -> list[Mistake]:
    """Everything that is wrong with ``config`` itself, and every disagreement with the recipe.

    Without ``facts`` only what the recipe alone decides is compared.
    """
    return [*_shape(config), *_zero(config), *_optimizer(config, train), *_differences(config, train, facts)]


def _shape(config: Mapping[str, Any]) -> Iterator[Mistake]:
    for key in config:
        if key in REFUSED:
            yield Mistake(key, "is not for a recipe", REFUSED[key])
        elif key not in KNOWN:
            yield Mistake(key, "DeepSpeed has no such key", _near(key, KNOWN))
    for key in ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16"):
        if key in config and not isinstance(config[key], Mapping):
            yield Mistake(key, f"expected a mapping, got {config[key]!r}")
    if _on(config, "bf16") and _on(config, "fp16"):
        yield Mistake("fp16.enabled", "excludes `bf16.enabled`", "keep one of them")


def _on(config: Mapping[str, Any], kind: str) -> bool:
    return _get(config, f"{kind}.enabled") is True


def _zero(config: Mapping[str, Any]) -> Iterator[Mistake]:
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping):
        if zero is None:
            yield Mistake("zero_optimization", "is missing", "give it a stage from 1 to 3, or remove `deepspeed`")
        return
    stage = stage_of(config)
    if stage not in (1, 2, 3):
        hint = "1 shards optimizer states, 2 gradients too, 3 weights too"
        if zero.get("stage") == 0:
            hint = "without sharding DeepSpeed is not needed: remove `deepspeed`"
        yield Mistake("zero_optimization.stage", f"expected 1, 2 or 3, got {zero.get('stage')!r}", hint)
    for key in zero:
        where = f"zero_optimization.{key}"
        if key in _OLD_KEYS:
            yield Mistake(where, "is an old name", f"write `{_OLD_KEYS[key]}`")
        elif key not in KNOWN_ZERO:
            yield Mistake(where, "DeepSpeed has no such key", _near(key, KNOWN_ZERO))
        elif stage in (1, 2) and key.removeprefix("stage3_") in _ONLY_STAGE3:
            yield Mistake(where, f"needs stage 3, and the stage is {stage}", "remove it, or set stage: 3")
    for what in ("optimizer", "param"):
        yield from _offload(zero.get(f"offload_{what}"), f"zero_optimization.offload_{what}", stage)


def _offload(block: Any, key: str, stage: int | None) -> Iterator[Mistake]:
    if block is None:
        return
    if not isinstance(block, Mapping):
        yield Mistake(key, f"expected a mapping, got {block!r}", "for example {device: cpu}")
        return
    device = block.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        yield Mistake(f"{key}.device", f"expected none, cpu or nvme, got {device!r}")
    if device == "nvme":
        if stage in (1, 2):
            yield Mistake(f"{key}.device", f"nvme needs stage 3, and the stage is {stage}", "use cpu, or set stage: 3")
        if not block.get("nvme_path"):
            hint = "a folder on a local NVMe disk, or `auto` for one in the output folder"
            yield Mistake(f"{key}.nvme_path", "is missing", hint)


def _near(key: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean `{near[0]}`?" if near else "remove it"


def _optimizer(config: Mapping[str, Any], train: TrainSettings) -> Iterator[Mistake]:
    ours = train.optim.partition("_")[0]
    kind = _get(config, "optimizer.type")
    if kind not in (None, AUTO):
        found = _OPTIMIZERS.get(str(kind).lower())
        if found is None:
            hint = "`train.optim` names the optimizer: remove the block"
            yield Mistake("optimizer.type", f"{kind} is none that a recipe can name", hint)
        elif found != ours:
            yield _two_sides("optimizer.type", kind, "train.optim", train.optim)
    schedule = _get(config, "scheduler.type")
    if schedule not in (None, AUTO) and _SCHEDULES.get(str(schedule)) != train.lr_scheduler_type:
        yield _two_sides("scheduler.type", schedule, "train.lr_scheduler_type", train.lr_scheduler_type)
    curve = _get(config, "scheduler.params.warmup_type")
    if curve not in (None, AUTO, "linear"):
        yield Mistake("scheduler.params.warmup_type", f"{curve}, but a recipe's warm-up is linear", "remove it")


def _two_sides(key: str, there: Any, recipe_key: str, here: Any) -> Mistake:
    return Mistake(
        key, f"is {_shown(there)}, but `{recipe_key}` is {_shown(here)}", f"make them equal, or write `{AUTO}`"
    )


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _expected(train: TrainSettings, facts: Facts | None) -> Iterator[tuple[str, str, Any]]:
    """Key of DeepSpeed, key of the recipe, and the value that it has there; None: not known yet."""
    size, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    fixed = isinstance(size, int)
    yield "train_micro_batch_size_per_gpu", "train.per_device_train_batch_size", size if fixed else None
    yield "gradient_accumulation_steps", "train.gradient_accumulation_steps", steps
    product = "train.per_device_train_batch_size * train.gradient_accumulation_steps * processes"
    yield "train_batch_size", product, size * steps * facts.processes if facts and fixed else None
    yield "gradient_clipping", "train.max_grad_norm", train.max_grad_norm
    yield "optimizer.params.lr", "train.learning_rate", train.learning_rate
    yield "optimizer.params.betas", "[train.adam_beta1, train.adam_beta2]", [train.adam_beta1, train.adam_beta2]
    yield "optimizer.params.eps", "train.adam_epsilon", train.adam_epsilon
    yield "optimizer.params.weight_decay", "train.weight_decay", train.weight_decay
    yield "scheduler.params.warmup_max_lr", "train.learning_rate", train.learning_rate
    yield "scheduler.params.warmup_min_lr", "train.warmup_steps", 0
    yield "scheduler.params.warmup_num_steps", "train.warmup_steps", facts.warmup if facts else None
    yield "scheduler.params.total_num_steps", "train.max_steps", facts.steps if facts else None
    yield "bf16.enabled", "train.bf16 (or model.dtype)", facts.bf16 if facts else True if train.bf16 else None
    yield "fp16.enabled", "train.fp16 (or model.dtype)", facts.fp16 if facts else True if train.fp16 else None


def _differences(config: Mapping[str, Any], train: TrainSettings, facts: Facts | None) -> Iterator[Mistake]:
    for key, recipe_key, value in _expected(train, facts):
        there = _get(config, key)
        if there in (None, AUTO) or value is None or _equal(there, value):
            continue
        yield _two_sides(key, there, recipe_key, value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-9, abs_tol=0.0)
    except (TypeError, ValueError):
        return bool(a == b)


def _get(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


# What is run


def resolve(config: Mapping[str, Any], train: TrainSettings, facts: Facts, *, source: str = "deepspeed") -> Config:
    """``config`` with every ``auto`` filled in from the recipe: what is written to ``deepspeed.json``.

    Raises UsageError that lists every mistake and disagreement; ``source`` names the file or the recipe's key there.
    """
    if wrong := mistakes(config, train, facts):
        lines = [f"  {m.key}: {m.message}" + (f" ({m.hint})" if m.hint else "") for m in wrong]
        raise UsageError("\n".join([f"{source} does not go with the recipe:", *lines]))
    made = copy.deepcopy(dict(config))
    for kind in ("bf16", "fp16"):
        made[kind] = {"enabled": AUTO} | dict(made.get(kind) or {})
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        made.setdefault(key, AUTO)
    for key, _, value in _expected(train, facts):
        _fill(made, key, value)
    # A step whose gradients are not finite is skipped, so that the run can end with its weights whole.
    if facts.bf16:
        made["bf16"].setdefault("check_grad_overflow", True)
    _fill(made, "optimizer.type", "AdamW" if train.optim.startswith("adamw") else "SGD")
    by_name = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    _fill(made, "scheduler.type", by_name.get(train.lr_scheduler_type, train.lr_scheduler_type))
    _fill(made, "scheduler.params.warmup_type", "linear")
    return _fill_sizes(made, facts)


def _fill_sizes(made: Config, facts: Facts) -> Config:
    """Buffers by the width of the model, as Hugging Face's Trainer has it."""
    square = facts.hidden_size * facts.hidden_size
    _fill(made, "zero_optimization.reduce_bucket_size", square)
    _fill(made, "zero_optimization.stage3_prefetch_bucket_size", int(0.9 * square))
    _fill(made, "zero_optimization.stage3_param_persistence_threshold", 10 * facts.hidden_size)
    for what in ("optimizer", "param"):
        _fill(made, f"zero_optimization.offload_{what}.nvme_path", str(facts.swap))
    _fill(made, "zero_optimization.offload_param.buffer_size", _aligned(facts.largest))
    return made


def _aligned(count: int) -> int:
    return -(-count // 1024) * 1024


def with_schedule(config: Config, *, steps: int, warmup: int) -> Config:
    """A resolved ``config`` with the length of the run filled in. Raises UsageError where it says another."""
    made = copy.deepcopy(config)
    for key, recipe_key, value in (
        ("scheduler.params.warmup_num_steps", "train.warmup_steps", warmup),
        ("scheduler.params.total_num_steps", "train.max_steps", steps),
    ):
        there = _get(made, key)
        if there not in (None, AUTO) and not _equal(there, value):
            wrong = _two_sides(key, there, recipe_key, value)
            raise UsageError(f"deepspeed does not go with the recipe:\n  {wrong.key}: {wrong.message} ({wrong.hint})")
        _fill(made, key, value)
    return made


def _fill(config: Config, key: str, value: Any) -> None:
    if value is None:
        return
    *path, last = key.split(".")
    block: Any = config
    for name in path:
        block = block.get(name) if isinstance(block, dict) else None
    if isinstance(block, dict) and block.get(last) == AUTO:
        block[last] = value


def for_engine(resolved: Mapping[str, Any]) -> Config:
    """What DeepSpeed's engine is given: optimizer and schedule are made by the recipe, as without DeepSpeed."""
    made = copy.deepcopy({k: v for k, v in resolved.items() if k not in ("optimizer", "scheduler")})
    made["zero_allow_untested_optimizer"] = True
    made["zero_force_ds_cpu_optimizer"] = False  # which optimizer it is was decided before
    return made


def write_presets(folder: Path) -> None:
    """The presets as files, to copy and to change."""
    for name in PRESETS:
        (folder / f"{name}.json").write_text(json.dumps(preset(name), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_presets(Path(sys.argv[1]))
