"""A prompt test as a whole: what its recipe asks for, read and checked; static checks, answers and their grades."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.context import Progress, RunContext
from llmkit.data import sources
from llmkit.errors import RecipeError, UsageError
from llmkit.inference.engines import require
from llmkit.inference.settings import AnsweringModel, EndpointSettings, LocalModelSettings, as_model
from llmkit.prompting.assertions import KINDS, Finding, Helpers, needed, read
from llmkit.prompting.cases import TestCase, case_files, inline_assertions, read_cases
from llmkit.prompting.few_shot import Embed
from llmkit.prompting.outcomes import Comparison, Outcome, compare, read_results, shortfalls
from llmkit.prompting.pages import Findings
from llmkit.prompting.report import Case, Prices, StaticReport, Subject
from llmkit.prompting.show import Shown, show_html, show_terminal, views
from llmkit.prompting.smoke import (
    CHAT_TEMPLATE,
    Answers,
    Judge,
    Prompt,
    Tested,
    ask,
    chooser,
    grade_case,
    make_prompts,
    types_in,
)
from llmkit.prompting.static import VersionDiff, check_static, compare_versions, open_subject
from llmkit.prompting.template import PromptTemplate, load_template
from llmkit.prompting.user_code import file_of
from llmkit.recipe_hints import close

if TYPE_CHECKING:
    from llmkit.stages.prompt_test import Recipe

OWN = "chat_template"
"""How a recipe names the model's own chat template among ``templates``."""
PAGE_CASES = 3
"""Cases of each template that are written token by token into the run's folder."""


@dataclass
class Suite:
    """See ``open_suite``. ``notes`` are what reports should say beside the numbers."""

    recipe: Recipe
    templates: list[Tested]
    tests: list[TestCase]
    models: list[AnsweringModel]
    embed: Embed | None = None
    notes: list[str] = field(default_factory=list)
    _find_pii: Callable[[str], Sequence[Finding]] | None = None

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Every case in every template. Raises DataError with all that does not fit together."""
        return make_prompts(self.templates, self.tests)

    def cases(self, tested: Tested) -> list[Case]:
        """The cases as the static checks take them: for the model's own template with the messages that it is given."""
        prompts = [prompt for prompt in self.prompts if prompt.template == tested.label]
        if tested.template is not None:
            return [prompt.test.case for prompt in prompts]
        found = []
        for prompt in prompts:
            case = prompt.test.case
            messages = [] if isinstance(prompt.prompt, str) else [dict(message) for message in prompt.prompt]
            found.append(Case(case.id, case.values, messages, case.tools, case.answer))
        return found

    # Static

    @cached_property
    def subjects(self) -> list[Subject]:
        """Tokenizers of the models; a URL without ``tokenizer`` has none. Raises MissingError."""
        return [one for model in self.models if (one := _subject(model)) is not None]

    def check(self, progress: Progress) -> list[StaticReport]:
        """The static checks of every template with every model. Raises DataError for cases that do not fit."""
        prices = Prices(self.recipe.prices.input, self.recipe.prices.output)
        for model in self.models:
            if isinstance(model, EndpointSettings) and model.tokenizer is None:
                self.notes.append(f"{model.label}: no static checks, because its `tokenizer` is not named")
        reports = []
        pairs = [(tested, subject) for subject in self.subjects for tested in self.templates]
        with progress.task("static checks", total=len(pairs), unit="templates") as task:
            for tested, subject in pairs:
                report = check_static(
                    tested.template, subject, self.cases(tested), max_length=self.recipe.max_length, prices=prices,
                    demonstrations=tested.demonstrations,
                )  # fmt: skip
                report.template = tested.label
                reports.append(report)
                task.advance()
        return reports

    def versions(self) -> list[VersionDiff]:
        """What changed between versions of one template, each against the one before it in the recipe."""
        made: list[VersionDiff] = []
        last: dict[tuple[str, str], Tested] = {}
        for tested in self.templates if self.subjects else ():
            if tested.template is None:
                continue
            key = (tested.template.name, tested.template.language)
            old = last.get(key)
            if old is not None and old.template is not None:
                diff = compare_versions(
                    old.template, tested.template, self.subjects[0], self.cases(tested),
                    old_demonstrations=old.demonstrations, new_demonstrations=tested.demonstrations,
                )  # fmt: skip
                made.append(diff)
            last[key] = tested
        return made

    def show(self, number: int) -> str:
        """Case ``number`` (from 1) token by token, in colours on a terminal. UsageError where there is no such case."""
        from rich.console import Console

        if number > len(self.tests):
            raise UsageError(f"--show {number}: there are {len(self.tests)} cases.")
        console = Console(soft_wrap=True)
        with console.capture() as captured:
            show_terminal(self._shown([self.tests[number - 1].key]), console)
        return captured.get()

    def _shown(self, keys: Sequence[str]) -> list[Shown]:
        """Cases in tokens, by every template that they are for and every tokenizer."""
        made: list[Shown] = []
        for tested in self.templates:
            prompts = [prompt for prompt in self.prompts if prompt.template == tested.label and prompt.test.key in keys]
            ids = {prompt.test.case.id for prompt in prompts}
            cases = [case for case in self.cases(tested) if case.id in ids]
            for subject in self.subjects if cases else ():
                made += views(tested.template, subject, cases, tested.demonstrations)
        return made

    def token_page(self) -> str | None:
        """The first cases of each template token by token, as HTML; None where no model has a tokenizer here."""
        keys: set[str] = set()
        for tested in self.templates:
            keys.update([p.test.key for p in self.prompts if p.template == tested.label][:PAGE_CASES])
        shown = self._shown(sorted(keys)) if self.subjects else []
        return show_html(shown, f"Tokens: {self.recipe.name}") if shown else None

    # Dynamic

    def ask(self, ctx: RunContext, earlier: Path | None = None) -> list[Outcome]:
        """Answers of every model to every prompt, graded; ``earlier`` is a run whose answers may be taken over.

        Raises StoppedEarly with the answers kept, MissingError for a model or server that is not there.
        """
        types = types_in(self.prompts)
        self._require(types)
        logprobs = bool(types & {"perplexity", "perplexity-score"})
        answers = Answers(ctx.output_dir, earlier)
        made = {
            model.label: ask(
                model, self.prompts, self.recipe.generation, answers, logprobs=logprobs, progress=ctx.progress, stop=ctx.stop
            )
            for model in self.models
        }  # fmt: skip
        if answers.taken_over:
            self.notes.append(
                f"{answers.taken_over} answers were taken over from {earlier}: nothing that decides them changed"
            )
        with ExitStack() as stack:
            helpers = self._helpers(types, answers, stack)
            graded = [
                grade_case(prompt, model, answer, helpers)
                for model, completions in made.items()
                for prompt, answer in zip(self.prompts, completions, strict=True)
            ]
        if cut := getattr(self.embed, "cut", 0):
            self.notes.append(
                f"{cut} texts were longer than {self.recipe.embedding_model} takes and were cut for `similar`"
            )
        return graded

    def _require(self, types: set[str]) -> None:
        """What is missing is told before the first answer, not after the last."""
        for model in [
            *self.models,
            *([as_model(self.recipe.judge)] if self.recipe.judge and "llm-rubric" in types else []),
        ]:
            require(model)
        if "no-pii" in types:
            from llmkit.data.guard.privacy import PrivacyFilter

            self._find_pii = PrivacyFilter().find

    def _helpers(self, types: set[str], answers: Answers, stack: ExitStack) -> Helpers:
        judge = None
        if "llm-rubric" in types and self.recipe.judge is not None:
            # A judge is to give the same verdict every time, whatever the answers are sampled with.
            settings = self.recipe.generation.model_copy(
                update={"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 512}
            )
            judge = Judge(as_model(self.recipe.judge), settings, answers, stack)
        return Helpers(embed=self.embed, judge=judge, find_pii=self._find_pii)

    # Together

    def findings(self, statics: Sequence[StaticReport], outcomes: Sequence[Outcome], before: Path | None) -> Findings:
        """Everything for the reports; ``before`` is the folder of the run to compare with."""
        limits = self.recipe.thresholds.model_dump()
        bare = sum(not prompt.assertions for prompt in self.prompts)
        if outcomes and bare:
            self.notes.append(f"{bare} of {len(self.prompts)} prompts have no assertion: whatever is answered passes")
        unfinished = sum(not one.finished for one in outcomes)
        if unfinished:
            self.notes.append(f"{unfinished} answers were cut at generation.max_new_tokens")
        return Findings(
            name=self.recipe.name, outcomes=outcomes, statics=statics, versions=self.versions() if statics else (),
            comparison=self._comparison(outcomes, before),
            shortfalls=tuple(shortfalls(outcomes, limits)) if outcomes else (), notes=tuple(self.notes),
            names=([tested.label for tested in self.templates], [model.label for model in self.models]),
        )  # fmt: skip

    def _comparison(self, outcomes: Sequence[Outcome], before: Path | None) -> Comparison | None:
        results = read_results(before) if before is not None and outcomes else None
        return compare(outcomes, results, str(before)) if results is not None else None


def open_suite(recipe: Recipe) -> Suite:
    """Read templates and cases. Nothing is loaded but what chooses demonstrations by nearness.

    Raises RecipeError for templates, DataError for cases, UsageError for what does not fit the recipe.
    """
    templates = load_templates(recipe.all_templates)
    tests = read_cases(recipe.cases, recipe.default_assert, recipe.max_cases)
    _check_helpers(recipe, tests)
    rules = [
        template.few_shot.choose for template in templates if template is not None and template.few_shot is not None
    ]
    similar = "similar" in needed(assertion for test in tests for assertion in test.assertions)
    embed = None
    if recipe.embedding_model is not None and (similar or {"nearest", "same"} & set(rules)):
        from llmkit.inference.embedding.remember import TextVectors

        embed = TextVectors(recipe.embedding_model)
    labels = _labels(templates)
    tested = [Tested(label, one, chooser(one, embed)) for label, one in zip(labels, templates, strict=True)]
    suite = Suite(recipe, tested, tests, list(recipe.all_models), embed)
    _check_threshold_names(suite)
    return suite


def load_templates(names: Sequence[str]) -> list[PromptTemplate | None]:
    """Templates by path or shipped name, None for the model's own. RecipeError with the mistakes of all of them."""
    made: list[PromptTemplate | None] = []
    problems = []
    for name in names:
        try:
            made.append(None if name == OWN else load_template(name))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems, what="prompt templates")
    return made


def _labels(templates: Sequence[PromptTemplate | None]) -> list[str]:
    """``name@version``, with the language before it where several templates are called so.

    Raises UsageError where that does not tell them apart either.
    """
    titles = [CHAT_TEMPLATE if template is None else template.title for template in templates]
    labels = [
        f"{template.language}-{title}"
        if template is not None and template.language and titles.count(title) > 1
        else title
        for template, title in zip(templates, titles, strict=True)
    ]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UsageError(
            f"templates: more than one is called {', '.join(twice)}. Give one of them another version or name."
        )
    return labels


def _check_threshold_names(suite: Suite) -> None:
    """A threshold for a name that is not there would never fail."""
    known = {
        "template": [name for t in suite.templates for name in (t.label, t.label.rpartition("@")[0]) if name],
        "model": [model.label for model in suite.models],
    }
    wrong = []
    for key, names in known.items():
        wanted = getattr(suite.recipe.thresholds, key)
        for name in wanted if isinstance(wanted, dict) else ():
            if name not in names:
                likely = close(name, names)
                hint = f" Did you mean {likely}?" if likely else f" There are {', '.join(names)}."
                wrong.append(f"thresholds.{key}: there is no {key} {name}.{hint}")
    if wrong:
        raise UsageError("\n".join(wrong))


def _check_helpers(recipe: Recipe, tests: Sequence[TestCase]) -> None:
    wanted = {KINDS[name].needs: name for name in needed(a for test in tests for a in test.assertions)}
    missing = [
        f"{key} is not set: the assertion `{wanted[key]}` of the cases needs it"
        for key in ("judge", "embedding_model")
        if key in wanted and getattr(recipe, key) is None
    ]
    if missing:
        raise UsageError("\n".join(missing))


def _subject(model: AnsweringModel) -> Subject | None:
    """A model's tokenizer for the static checks, without its weights."""
    if isinstance(model, EndpointSettings):
        return open_subject(model.tokenizer, name=model.label) if model.tokenizer is not None else None
    from llmkit.inference.engines import system_of
    from llmkit.modeling.locate import find_folder, weights_folder

    local = Path(model.name_or_path).expanduser()
    if local.is_dir():
        folder, system = weights_folder(local), system_of(model, local)
    else:
        folder, system = find_folder(model.name_or_path, model.revision, weights=False), model.system or None
    return open_subject(
        str(folder), name=model.label, chat_template=model.chat_template, system=system,
        trust_remote_code=model.trust_remote_code,
    )  # fmt: skip


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of everything on this machine that decides what a prompt test finds: templates, their demonstrations,
    cases, local models, Python files of assertions that the recipe names itself.

    Raises RecipeError for templates that cannot be read, DataError for cases that are not there.
    """
    from llmkit.modeling.locate import fingerprint, weights_folder

    found: dict[str, str] = {}
    for template in load_templates(recipe.all_templates):
        if template is None:
            continue
        found[template.path] = f"sha256:{template.digest}"
        if template.few_shot is not None and isinstance(template.few_shot.examples, str):
            found |= _file_digest(Path(template.path).parent / template.few_shot.examples)
    if settings := case_files(recipe.cases):
        found |= sources.digest(settings, "cases")
    for model in recipe.all_models:
        if isinstance(model, LocalModelSettings) and Path(model.name_or_path).expanduser().is_dir():
            found[model.name_or_path] = fingerprint(weights_folder(model.name_or_path))
    for assertion in [*read(recipe.default_assert)[0], *inline_assertions(recipe.cases)]:
        if assertion.type == "python" and (file := file_of(str(assertion.value))) is not None:
            found |= _file_digest(file)
    return found


def _file_digest(file: Path) -> dict[str, str]:
    """Nothing for a file that is not there: what reads it says so better."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        return {str(file): "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()}
