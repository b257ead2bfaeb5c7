"""Continued pre-training on plain text: ``llmkit cpt recipe.yaml``."""

from __future__ import annotations

from llmkit.context import Result, RunContext
from llmkit.modeling.settings import AdapterSettings
from llmkit.training.settings import TrainingRecipe


class Recipe(TrainingRecipe):
    """Continue (or, with ``model.init: from_config``, begin) pre-training on text, every token learned."""

    adapter: AdapterSettings | None = None
    """Train an adapter instead of all weights."""


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.training.run import train

    return train(recipe, ctx, stage="cpt", adapter=recipe.adapter)
