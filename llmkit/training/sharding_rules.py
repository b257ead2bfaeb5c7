"""What goes wrong between ``deepspeed:`` or ``fsdp:`` and the rest of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmkit.recipe import Conflict
from llmkit.training import zero_config

if TYPE_CHECKING:
    from llmkit.training.settings import TrainingRecipe


def sharding_conflicts(recipe: TrainingRecipe) -> Iterator[Conflict]:
    """Everything that can be told without reading a file; the rest is told when the run starts."""
    if recipe.deepspeed is not None:
        yield from _deepspeed(recipe)
    if recipe.deepspeed is not None and recipe.fsdp is not None:
        yield Conflict("fsdp", "excludes `deepspeed`: both divide the model", "keep one of them", ("deepspeed",))
    divided = recipe.deepspeed is not None or recipe.fsdp is not None
    if divided and recipe.train.per_device_train_batch_size == "auto":
        message, key = "is found with the whole model on one device", "fsdp" if recipe.fsdp is not None else "deepspeed"
        yield Conflict("train.per_device_train_batch_size", f"auto {message}", "give a number", (key,))
    if recipe.fsdp is not None and recipe.train.fp16:
        yield Conflict("train.fp16", "float16 needs a loss scaler, which `fsdp` has none of", "use `bf16`", ("fsdp",))
    stage = 3 if recipe.fsdp is not None else zero_config.known_stage(_setting(recipe))
    if stage is not None:
        key = "fsdp" if recipe.fsdp is not None else "deepspeed"
        yield from with_stage(recipe, key, stage)
    if recipe.model.init == "sharded":
        yield from _sharded_loading(recipe)


def _setting(recipe: TrainingRecipe) -> Any:
    given = recipe.deepspeed
    return None if isinstance(given, str) and zero_config.name_mistake(given) else given


def _deepspeed(recipe: TrainingRecipe) -> Iterator[Conflict]:
    given = recipe.deepspeed
    if isinstance(given, str):
        if wrong := zero_config.name_mistake(given):
            hint = f"presets are {', '.join(zero_config.PRESETS)}; a path ends in .json; or write a mapping"
            yield Conflict("deepspeed", wrong, hint)
        return
    assert given is not None
    for key, message, hint in zero_config.mistakes(given, recipe.train):
        yield Conflict(f"deepspeed.{key}", message, hint)


def with_stage(recipe: TrainingRecipe, key: str, stage: int) -> Iterator[Conflict]:
    """What does not go with a model that ``key`` (deepspeed or fsdp) divides at ZeRO ``stage``; FSDP counts as 3."""
    train = recipe.train
    if train.optim == "adafactor":
        message = f"works on the rows and columns of a matrix, and `{key}` divides weights without regard to them"
        yield Conflict("train.optim", f"adafactor {message}", "use adamw_torch_fused or sgd", (key,))
    if train.torch_compile:
        yield Conflict("train.torch_compile", f"is not for models that `{key}` divides", "remove one of them", (key,))
    if recipe.model.quantization is not None and stage == 3:
        message = f"quantized weights cannot be divided, which `{key}` would do"
        yield Conflict("model.quantization", message, "use `deepspeed: zero2`, or remove one of them", (key,))
    adapter: Any = getattr(recipe, "adapter", None)
    if adapter is not None and adapter.use_dora and stage == 3:
        message = f"measures whole weights in every step, and `{key}` has them divided"
        yield Conflict("adapter.use_dora", message, "use `deepspeed: zero2`, or a plain LoRA adapter", (key,))
    if adapter is not None and adapter.modules_to_save and stage == 3:
        message = f"layers trained in full beside an adapter cannot be gathered apart from it, as `{key}` does"
        yield Conflict("adapter.modules_to_save", message, "use `deepspeed: zero2`, or remove one of them", (key,))


def _sharded_loading(recipe: TrainingRecipe) -> Iterator[Conflict]:
    given, hint = recipe.deepspeed, "set `deepspeed: zero3`, or `init: pretrained`"
    if given is None:
        yield Conflict("model.init", "sharded loads the share of each process, and nothing divides the model", hint)
    elif not (isinstance(given, str) and zero_config.is_path(given)) and zero_config.known_stage(_setting(recipe)) != 3:
        yield Conflict("model.init", "sharded needs ZeRO stage 3", hint, ("deepspeed",))
    adapter: Any = getattr(recipe, "adapter", None)
    if adapter is not None and (adapter.use_dora or adapter.init_lora_weights in ("pissa", "olora")):
        key = "use_dora" if adapter.use_dora else "init_lora_weights"
        message = "starts from whole weights, and with `model.init: sharded` no process has them"
        yield Conflict(f"adapter.{key}", message, "use a plain LoRA adapter, or `init: pretrained`", ("model.init",))
