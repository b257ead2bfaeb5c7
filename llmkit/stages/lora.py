"""Fine-tuning of a LoRA or DoRA adapter over frozen weights: ``llmkit lora recipe.yaml``."""

from __future__ import annotations

from llmkit.context import Result, RunContext
from llmkit.modeling.settings import AdapterSettings
from llmkit.training.settings import TrainingRecipe


class Recipe(TrainingRecipe):
    """Fine-tune an adapter: a small file beside an unchanged base model."""

    adapter: AdapterSettings = AdapterSettings()
    """The adapter, in PEFT's names."""


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.training.run import train

    return train(recipe, ctx, stage="lora", adapter=recipe.adapter)
