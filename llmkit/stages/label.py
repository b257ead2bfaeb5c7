"""Label rows with models: classes, attributes, translations, summaries, keywords: ``llmkit label recipe.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmkit.context import Result, RunContext
from llmkit.inference.batch.settings import BatchRecipe
from llmkit.inference.settings import (
    EndpointSettings,
    GenerationSettings,
    LocalModelSettings,
    ModelChoice,
    as_model,
)
from llmkit.labelling.settings import (
    AbstainSettings,
    BudgetSettings,
    CombineSettings,
    GoldSettings,
    Labels,
    ScoringSettings,
    Text,
)
from llmkit.recipe import Conflict


class Recipe(BatchRecipe):
    """Label the rows of files by templates and models: one of N labels with its probability, a text, or JSON by a schema."""

    not_here: ClassVar[Mapping[str, str]] = {
        "data": "here it is `input`",
        "model": "here it is `models`, one or a list",
        "template": "here it is `templates`, one or a list",
        "prompt": "write it into a template file and name that in `templates`",
        "classes": "here it is `labels`",
        "candidate_labels": "here it is `labels`",
        "categories": "here it is `labels`",
        "hypothesis_template": "here it is `templates`",
        "threshold": "here it is `abstain.below`",
        "num_return_sequences": "here it is `samples`",
        "batch_size": "here it is `generation.batch_size`",
    }
    free_text: ClassVar[frozenset[str]] = frozenset({"values", "labels"})

    models: ModelChoice | list[ModelChoice]
    """One model or a list: a folder, hub id or run folder, or a mapping with ``base_url`` and ``model`` of an OpenAI-compatible URL."""
    templates: Text | list[Text]
    """One template or a list: files, or names of shipped ones; as in `llmkit prompt-test`."""
    columns: dict[Text, Text] = Field(default_factory=dict)
    """Column of the input for a variable of the templates; a variable that is not here has the column of its own name."""
    values: dict[Text, Any] = Field(default_factory=dict)
    """Variables that are the same for every row, e.g. ``{sentences: 2}``."""
    labels: Labels | None = None
    """The labels: a list, a mapping of names to what the model writes, or a file with one in each line; None gives text, or JSON where the template has an ``output_schema``."""
    method: Literal["score", "generate"] = "score"
    """With ``labels``: ``score`` measures every label's probability; ``generate`` writes one, held to the labels."""
    scoring: ScoringSettings = ScoringSettings()
    """How scores become probabilities."""
    samples: Annotated[int, Field(ge=1, le=1000)] = 1
    """Answers that are drawn for each row; their agreement is the share of the votes (self-consistency)."""
    generation: GenerationSettings = GenerationSettings()
    """How long answers may be and how they are drawn."""
    combine: CombineSettings = CombineSettings()
    """How several models or templates come to one label."""
    abstain: AbstainSettings = AbstainSettings()
    """When a row gets no label."""
    gold: GoldSettings | None = None
    """Right labels to compare with."""
    budget: BudgetSettings = BudgetSettings()
    """The most that the run may cost."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from self._empty_and_twice()
        yield from self._label_conflicts()
        if self.samples > 1 and self.generation.temperature == 0:
            yield Conflict(
                "generation.temperature", f"0 would draw the same answer {self.samples} times", "e.g. 0.7",
                ("samples",),
            )  # fmt: skip
        if self.combine.rule != "majority" and len(self.all_models) * len(self.all_templates) == 1:
            yield Conflict("combine.rule", "there is one voter: one model with one template", "remove it")
        if self.combine.rule in ("mean", "dawid-skene") and self.labels is None:
            yield Conflict("combine.rule", f"{self.combine.rule} needs `labels`", "take `majority`", ("labels",))
        yield from self._weights()

    def _empty_and_twice(self) -> Iterator[Conflict]:
        for key in ("models", "templates"):
            if getattr(self, key) == []:
                yield Conflict(key, "is empty")
        seen: set[str] = set()
        for index, model in enumerate(self.all_models):
            if model.label in seen:
                key = f"models.{index}" if isinstance(self.models, list) else "models"
                yield Conflict(key, f"a second model is called {model.label}", "give one of them a `name`")
            seen.add(model.label)
        for index, template in enumerate(self.all_templates):
            if template in self.all_templates[:index]:
                yield Conflict(f"templates.{index}", f"{template} is there twice")

    def _label_conflicts(self) -> Iterator[Conflict]:
        if self.labels is None:
            for key, default in (("method", "score"), ("scoring", ScoringSettings())):
                if getattr(self, key) != default:
                    yield Conflict(key, "is not used without `labels`", also=("labels",))
            return
        if not isinstance(self.labels, str) and len(self.labels) < 2:
            yield Conflict("labels", "there is nothing to choose from", "name at least two")
        if isinstance(self.labels, list):
            for index, label in enumerate(self.labels):
                if label in self.labels[:index]:
                    yield Conflict(f"labels.{index}", f"{label} is there twice")
        if self.method == "score":
            remote = [m.label for m in self.all_models if isinstance(m, EndpointSettings)]
            if remote:
                yield Conflict("method", f"{remote[0]} is behind a URL, which scores no labels", "write `method: generate`", ("models",))  # fmt: skip
            if self.samples > 1:
                yield Conflict("samples", "is not used with `method: score`", "write `method: generate`", ("method",))
        elif self.scoring != ScoringSettings():
            yield Conflict("scoring", "is not used with `method: generate`", also=("method",))

    def _weights(self) -> Iterator[Conflict]:
        models = {model.label for model in self.all_models}
        for name in self.combine.weights:
            if name.split("/")[0] not in models and name not in models:
                yield Conflict(f"combine.weights.{name}", "there is no such model", f"there are {', '.join(models)}")

    @property
    def all_templates(self) -> list[str]:
        return [self.templates] if isinstance(self.templates, str) else list(self.templates)

    @property
    def all_models(self) -> list[LocalModelSettings | EndpointSettings]:
        return [as_model(one) for one in (self.models if isinstance(self.models, list) else [self.models])]


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.inference.batch.run import run_batch
    from llmkit.labelling.finish import finish
    from llmkit.labelling.work import LabelWork

    LabelWork(recipe)  # templates, labels, tokenizers and models that cannot be used end the run here
    report = run_batch(recipe, ctx, "label")
    found = finish(recipe, report.shards, ctx)
    return Result(
        stage="label", name=recipe.name, output_dir=ctx.output_dir, metrics={**report.metrics, **found.metrics},
        artifacts={**report.artifacts, **found.artifacts}, samples=found.samples,
    )  # fmt: skip
