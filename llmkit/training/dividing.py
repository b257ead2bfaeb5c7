"""What a run that divides its model does besides: which engine, with which configuration, and how the model is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmkit.context import RunContext
from llmkit.errors import UsageError, WontFitError
from llmkit.modeling.devices import GIB, device, host_memory
from llmkit.modeling.export import save_description
from llmkit.modeling.load import auto_class, load_config, load_model
from llmkit.modeling.locate import find_folder, saved_dtype
from llmkit.modeling.settings import ModelSettings
from llmkit.training import zero_config
from llmkit.training.arguments import warmup_steps
from llmkit.training.objective import Objective, choose
from llmkit.training.plan import Planner
from llmkit.training.settings import TrainingRecipe
from llmkit.training.sharding import Shards, group_of_one, rank_variables, skeleton, small_twin
from llmkit.training.sharding_rules import with_stage

EXPORT = "export"
"""Folder of a checkpoint with all of a model except its weights."""


def shards_of(recipe: TrainingRecipe, ctx: RunContext, tokenizer: PreTrainedTokenizerBase) -> Shards | None:
    """The engine that the recipe asks for, not yet around a model; None where it asks for none.

    Several processes have their group already. Raises UsageError for a configuration that does not go with the recipe,
    MissingError for what it needs and this machine lacks, WontFitError for an offload that the host has no memory for.
    """
    if recipe.deepspeed is None and recipe.fsdp is None:
        return None
    group_of_one()
    if recipe.fsdp is not None:
        from llmkit.training.fsdp import Fsdp

        if recipe.fsdp.offload_params:
            check_host(recipe, ctx)
        return Fsdp(recipe.fsdp, ctx, bf16=recipe.train.bf16)
    from llmkit.training.zero import Zero, check_nvme

    config = _resolved(recipe, ctx, tokenizer)
    if "cpu" in (zero_config.offload(config, "optimizer"), zero_config.offload(config, "param")):
        check_host(recipe, ctx)
    check_nvme(config)
    zero = Zero(config, ctx)
    wrong = [f"{c.key}: {c.message} ({c.hint})" for c in with_stage(recipe, "deepspeed", zero.stage)]
    if recipe.model.init == "sharded" and not zero.partitioned:
        wrong.append(f"model.init: sharded needs ZeRO stage 3, and deepspeed has stage {zero.stage}")
    if wrong:  # of a file, whose stage the recipe does not tell
        raise UsageError("\n".join(wrong))
    return zero


def _resolved(recipe: TrainingRecipe, ctx: RunContext, tokenizer: PreTrainedTokenizerBase) -> zero_config.Config:
    assert recipe.deepspeed is not None
    given = zero_config.read(recipe.deepspeed)
    kind = weights_type(recipe.model)
    hidden, largest = _sizes(recipe.model, len(tokenizer))
    facts = zero_config.Facts(
        processes=ctx.world_size,
        bf16=recipe.train.bf16 or kind == "bfloat16",
        fp16=recipe.train.fp16 or kind == "float16",
        hidden_size=hidden,
        largest=largest,
        steps=None,
        warmup=None,
        swap=ctx.output_dir / zero_config.SWAP,
    )
    source = recipe.deepspeed if isinstance(recipe.deepspeed, str) else "deepspeed"
    return zero_config.resolve(given, recipe.train, facts, source=source)


def check_host(recipe: TrainingRecipe, ctx: RunContext) -> None:
    """Refuse an offload that would exhaust the host: the kernel would end the run, or another program, in the middle.

    Counts the processes of this machine and the limit of its container. Raises WontFitError.
    """
    own = Planner(recipe, device(), ctx.world_size).own()
    if own.setup.sharding.optimizer != "cpu" and own.setup.sharding.parameters != "cpu":
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    each = own.memory.device if own.setup.cpu else own.memory.host
    there = host_memory()
    if each * here > there:
        raise WontFitError(
            f"Offload to host memory needs about {each / GIB:.1f} GiB for each process, {each * here / GIB:.1f} for the"
            f" {here} on this machine, which has {there / GIB:.1f} GiB. Use more machines, an adapter (llmkit lora), or"
            " deepspeed: zero3_nvme; `llmkit plan` shows what takes it."
        )


def weights_type(settings: ModelSettings) -> str:
    """Type of the weights in training, as ``model.dtype`` says or the folder has it."""
    if settings.dtype != "auto":
        return settings.dtype
    if settings.init == "from_config":
        return "float32"
    return saved_dtype(find_folder(settings.name_or_path, settings.revision))


def _sizes(settings: ModelSettings, tokens: int) -> tuple[int, int]:
    """Width of the model, and elements of its largest weight, from its configuration alone."""
    config = load_config(settings)
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0) or 1024)
    model = skeleton(config, auto_class(config), torch.float32)
    return hidden, max(*(p.numel() for p in model.parameters()), (tokens + 64) * hidden)


def finish(shards: Shards, recipe: TrainingRecipe, ctx: RunContext, steps: int) -> None:
    """Now that the length of the run is known: the rest of the configuration, written into the run's folder."""
    from llmkit.training.zero import Zero, write_config

    if not isinstance(shards, Zero):
        return
    shards.config = zero_config.with_schedule(shards.config, steps=steps, warmup=warmup_steps(recipe.train, steps))
    write_config(shards.config, ctx)


def load_divided(recipe: TrainingRecipe, shards: Shards | None, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The recipe's model: whole on this process, or its share of it with ``model.init: sharded``."""
    if shards is None or recipe.model.init != "sharded":
        return load_model(recipe.model, tokenizer=tokenizer, seed=recipe.seed)
    from llmkit.modeling.sharded import load_sharded
    from llmkit.training.zero import Zero, load_deepspeed

    assert isinstance(shards, Zero)
    deepspeed = load_deepspeed()
    with rank_variables():
        divided = deepspeed.zero.Init(config_dict_or_path=zero_config.for_engine(shards.config))
        return load_sharded(
            recipe.model, tokenizer=tokenizer, divided=divided,
            gather=lambda weights: deepspeed.zero.GatheredParameters(weights, modifier_rank=0),
        )  # fmt: skip


def choose_divided(
    model: Any, shards: Shards, *, sharded: bool, seq2seq: bool, own_attention: bool, device: torch.device
) -> tuple[Objective, list[str]]:
    """The objective for a model that will be divided; see :func:`llmkit.training.objective.choose`.

    A model that is divided already, or would not fit on the device whole, is asked by its small twin.
    """
    if not shards.partitioned:
        return choose(model, seq2seq=seq2seq, own_attention=own_attention, device=device)
    by_twin = sharded or device.type != "cpu"
    asked = small_twin(model, device) if by_twin else model
    objective, notes = choose(asked, seq2seq=seq2seq, own_attention=own_attention, device=device)
    return objective.within(model, device), notes


def describe_checkpoint(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, base: Any, **kept: Any) -> None:
    """Write what ``llmkit export-weights`` needs besides the weights into a checkpoint's folder."""
    save_description(model, tokenizer, folder / EXPORT, base, **kept)
