"""Test prompt templates before anything is trained: ``llmkit prompt-test recipe.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from llmkit.context import Result, RunContext
from llmkit.errors import UsageError
from llmkit.inference.settings import (
    EndpointSettings,
    GenerationSettings,
    LocalModelSettings,
    ModelChoice,
    as_model,
)
from llmkit.recipe import Conflict, Settings
from llmkit.recipe import Recipe as Base

Part = Annotated[float, Field(ge=0, le=1)]


class ThresholdSettings(Settings):
    """Least shares of cases that have to pass; below one of them the exit code is 4."""

    overall: Part = 1.0
    """Of all cases, templates and models together."""
    template: Part | dict[str, Part] | None = None
    """Of each template's cases; or by name, ``{en-query-rewriting: 0.9}``."""
    model: Part | dict[str, Part] | None = None
    """Of each model's cases; or by name."""


class PriceSettings(Settings):
    """Prices per million tokens, in any currency, for the cost that the static checks tell."""

    input: Annotated[float, Field(ge=0)] = 0.0
    """Of a prompt."""
    output: Annotated[float, Field(ge=0)] = 0.0
    """Of an answer."""


class Recipe(Base):
    """Test templates with models on cases: static checks with the tokenizer alone, then answers and assertions."""

    not_here: ClassVar[Mapping[str, str]] = {
        "prompts": "here it is `templates`",
        "providers": "here it is `models`",
        "tests": "here it is `cases`",
        "scenarios": "here it is `cases`",
        "defaultTest": "here it is `default_assert`, a list of assertions",
        "assert": "write it in a case, or in `default_assert` for all cases",
        "model": "here it is `models`, one or a list",
        "template": "here it is `templates`, one or a list",
        "data": "here it is `cases`",
    }
    free_text: ClassVar[frozenset[str]] = frozenset({"cases", "default_assert"})
    starts_over: ClassVar[bool] = True
    several_processes: ClassVar[bool] = False

    templates: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]]
    """One template or a list: files, names of shipped ones, or ``chat_template`` for the model's own, which takes a case's ``messages`` or ``prompt``."""
    models: ModelChoice | list[ModelChoice]
    """One model or a list: a folder, hub id or run folder, or a mapping with ``base_url`` and ``model`` of an OpenAI-compatible URL."""
    cases: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)] | dict[str, Any]]
    """The cases: files (JSONL, JSON, CSV, Parquet), globs, URIs, hub data sets, or mappings with ``vars`` and ``assert``."""
    max_cases: Annotated[int, Field(ge=1)] | None = None
    """Take so many of the cases, the first ones; None takes all."""
    default_assert: list[dict[str, Any]] = Field(default_factory=list)
    """Assertions that hold for every case, behind its own."""
    generation: GenerationSettings = GenerationSettings()
    """How long the answers may be and how they are drawn."""
    thresholds: ThresholdSettings = ThresholdSettings()
    """When the run fails."""
    static: bool = True
    """Check templates and tokenizers first; an error ends the run before anything is generated."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Length of training in tokens, as ``data.max_length`` will be: the static checks tell what it would cut."""
    prices: PriceSettings = PriceSettings()
    """Prices per million tokens, for the cost of the cases."""
    dynamic: bool = True
    """Let the models answer. False runs the static checks alone, which reads no weights."""
    judge: ModelChoice | None = None
    """The model that judges ``llm-rubric``: written like one of ``models``."""
    embedding_model: str | None = None
    """Folder or hub id of an embedding model, for ``similar`` and for demonstrations that are chosen by nearness."""
    compare_to: str | None = "last"
    """The run to compare with: ``last`` is the one that was in this output folder before, else a run's folder; None compares with none."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        for key in ("templates", "models", "cases"):
            if getattr(self, key) == []:
                yield Conflict(key, "is empty")
        yield from self._twice()
        if not self.static and not self.dynamic:
            yield Conflict("dynamic", "with `static: false` too there is nothing to do", also=("static",))
        yield from self._assertion_conflicts()

    def _twice(self) -> Iterator[Conflict]:
        """Two models of one name would be one column of the table."""
        seen: set[str] = set()
        for index, model in enumerate(self.all_models):
            if model.label in seen:
                key = f"models.{index}" if isinstance(self.models, list) else "models"
                yield Conflict(key, f"a second model is called {model.label}", "give one of them a `name`")
            seen.add(model.label)
        for index, template in enumerate(self.all_templates):
            if template in self.all_templates[:index]:
                yield Conflict(f"templates.{index}", f"{template} is there twice")

    def _assertion_conflicts(self) -> Iterator[Conflict]:
        from llmkit.prompting.assertions import KINDS, needed, read
        from llmkit.prompting.cases import inline_assertions, inline_mistakes

        always, mistakes = read(self.default_assert, "default_assert")
        for mistake in [*mistakes, *inline_mistakes(self.cases)]:
            yield Conflict(*mistake)
        wanted = {KINDS[name].needs: name for name in needed([*always, *inline_assertions(self.cases)])}
        for key in ("judge", "embedding_model"):
            if key in wanted and getattr(self, key) is None:
                yield Conflict(key, f"is missing: the assertion `{wanted[key]}` needs it")

    @property
    def all_templates(self) -> list[str]:
        return [self.templates] if isinstance(self.templates, str) else list(self.templates)

    @property
    def all_models(self) -> list[LocalModelSettings | EndpointSettings]:
        return [as_model(one) for one in (self.models if isinstance(self.models, list) else [self.models])]

    def input_digests(self) -> Mapping[str, str]:
        from llmkit.prompting.suite import input_digests

        return input_digests(self)


def show(recipe: Recipe, number: int) -> str:
    """``--show N``: the tokens of case number ``number``, from 1, by every template and model."""
    from llmkit.prompting.suite import open_suite

    return open_suite(recipe).show(number)


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.prompting import publish
    from llmkit.prompting.suite import open_suite

    if ctx.resume not in ("auto", "never"):
        raise UsageError(
            "--resume: a prompt test has no checkpoints; the same command goes on with the answers it has."
        )
    suite = open_suite(recipe)
    publish.record_inputs(suite, ctx.tracker)
    before = publish.run_before(ctx.output_dir, recipe.compare_to)
    statics = suite.check(ctx.progress) if recipe.static else []
    defect = any(report.errors for report in statics)
    outcomes = suite.ask(ctx, before) if recipe.dynamic and not defect else []
    found = suite.findings(statics, outcomes, before)
    metrics, artifacts = publish.publish(found, suite, ctx)
    publish.gate(found, ctx.output_dir, metrics, artifacts)
    return Result(
        stage="prompt-test", name=recipe.name, output_dir=ctx.output_dir, metrics=metrics, artifacts=artifacts,
        samples=publish.samples(found.failed),
    )  # fmt: skip
