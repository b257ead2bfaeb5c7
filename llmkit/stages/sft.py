"""Supervised fine-tuning of all weights: ``llmkit sft recipe.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from llmkit.context import Result, RunContext
from llmkit.training.settings import TrainingRecipe


class Recipe(TrainingRecipe):
    """Fine-tune every weight of a causal or sequence-to-sequence model on conversations."""

    not_here: ClassVar[Mapping[str, str]] = {
        "adapter": "full fine-tuning has no adapter: use `llmkit lora`, or remove the line",
    }


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.training.run import train

    return train(recipe, ctx, stage="sft")
