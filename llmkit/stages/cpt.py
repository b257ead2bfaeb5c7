"""Continued pre-training on plain text: ``llmkit cpt recipe.yaml``."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.context import Result, RunContext
from llmkit.data.settings import SourceSettings
from llmkit.modeling.settings import AdapterSettings
from llmkit.recipe import Conflict
from llmkit.training.settings import TrainingRecipe


class Recipe(TrainingRecipe):
    """Continue (or, with ``model.init: from_config``, begin) pre-training on text, every token learned."""

    adapter: AdapterSettings | None = None
    """Train an adapter instead of all weights."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        hint = "for conversations use `llmkit sft` or `llmkit lora`"
        if self.data.format not in ("auto", "text"):
            yield Conflict("data.format", f"continued pre-training reads text, not {self.data.format}", hint)
        for key, source in self.data.sources():
            trained = not key.startswith("guard.")
            if trained and isinstance(source, SourceSettings) and source.format not in (None, "text"):
                message = f"continued pre-training reads text, not {source.format}"
                yield Conflict(f"data.{key}.format", message, hint)


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.training.run import train

    # Detection would take conversations for what they are, and learn their answers only.
    as_text = recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": "text"})})
    return train(as_text, ctx, stage="cpt", adapter=recipe.adapter)
