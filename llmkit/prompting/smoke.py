"""The dynamic half of a prompt test: cases become prompts, models answer them, answers are kept and graded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmkit.context import Progress, StopFlag
from llmkit.data.rows import Message
from llmkit.errors import DataError, MissingError, StoppedEarly, UsageError
from llmkit.inference.engines import Completion, Engine, Question, identity, open_engine
from llmkit.inference.settings import AnsweringModel, EndpointSettings, GenerationSettings
from llmkit.prompting.assertions import Assertion, Given, Helpers, combine, for_case, grade, needed
from llmkit.prompting.cases import TestCase
from llmkit.prompting.few_shot import Demonstrations, Embed
from llmkit.prompting.outcomes import Outcome
from llmkit.prompting.template import PromptTemplate
from llmkit.prompting.user_code import UserCode

ANSWERS = "answers.jsonl"
CHAT_TEMPLATE = "chat template"
"""Label of the model's own chat template, which takes a case's messages as they are."""
MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Prompt:
    """One case in one template, ready to be asked; ``assertions`` with the case's variables filled in."""

    template: str
    test: TestCase
    prompt: Sequence[Message] | str
    examples: Sequence[Mapping[str, Any]] = ()
    expected: str | None = None
    assertions: tuple[Assertion, ...] = ()
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Tested:
    """A template under the label that tables have for it; ``template`` None is the model's own chat template."""

    label: str
    template: PromptTemplate | None
    demonstrations: Demonstrations | None = None

    @property
    def names(self) -> set[str]:
        """How a case or a threshold may name it: its label, with or without the version, its name, its file's."""
        if self.template is None:
            return {self.label, "chat_template"}
        return {self.label, self.label.rpartition("@")[0], self.template.name, Path(self.template.path).stem}


def chooser(template: PromptTemplate | None, embed: Embed | None = None) -> Demonstrations | None:
    """What picks a template's demonstrations; None where it shows none. Raises DataError for examples of no use."""
    if template is None or template.few_shot is None:
        return None
    names = [variable.name for variable in template.variables]
    return Demonstrations(template.few_shot, folder=Path(template.path).parent, variables=names, embed=embed)


def make_prompts(templates: Sequence[Tested], tests: Sequence[TestCase]) -> list[Prompt]:
    """Every case in every template that it is for. Raises DataError with everything that does not fit together."""
    made: list[Prompt] = []
    problems = _unknown_templates(templates, tests)
    for tested in templates:
        mine = [test for test in tests if not test.templates or tested.names & set(test.templates)]
        values = [test.case.values for test in mine]
        chosen = tested.demonstrations.pick_all(values) if tested.demonstrations else [[] for _ in mine]
        for test, examples in zip(mine, chosen, strict=True):
            try:
                made.append(_prompt(tested, test, examples))
            except DataError as error:
                problems.append(f"{tested.label}, {test.case.id}: {error}")
        if not mine:
            problems.append(f"{tested.label}: no case is for it")
    problems += _code_problems(made)
    if problems:
        shown = problems[:MOST_PROBLEMS]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise DataError("\n".join(["cases and templates do not fit together:", *(f"  {p}" for p in [*shown, *more])]))
    return made


def _unknown_templates(templates: Sequence[Tested], tests: Sequence[TestCase]) -> list[str]:
    known = {name for tested in templates for name in tested.names}
    wrong = {(test.case.id, name) for test in tests for name in test.templates if name not in known}
    labels = ", ".join(tested.label for tested in templates)
    return [f"{case}: templates: there is no template {name} (there are {labels})" for case, name in sorted(wrong)]


def _prompt(tested: Tested, test: TestCase, examples: Sequence[Mapping[str, Any]]) -> Prompt:
    template = tested.template
    if template is None:
        prompt: Sequence[Message] | str = plain_messages(test)
        expected, schema = test.case.answer, None
    else:
        prompt = template.render(test.case.values, examples)
        expected, schema = _right_answer(template, test), template.output_schema
    variables = {**test.case.values, **({} if expected is None else {"expected": expected})}
    assertions = [for_case(assertion, variables) for assertion in test.assertions]
    if schema is not None:
        assertions.append(Assertion("is-json", value=dict(schema)))
    return Prompt(tested.label, test, prompt, examples, expected, tuple(assertions), schema)


def _right_answer(template: PromptTemplate, test: TestCase) -> str | None:
    """By the case, else by the template."""
    return test.case.answer if test.case.answer is not None else template.answer(test.case.values)


def plain_messages(test: TestCase) -> list[Message]:
    """The messages of a case for the model's own chat template: ``messages``, or ``prompt`` with ``system`` before it.

    Raises DataError for a case with neither.
    """
    if test.case.messages is not None:
        return test.case.messages
    prompt, system = test.case.values.get("prompt"), test.case.values.get("system")
    if not isinstance(prompt, str) or not prompt.strip():
        has = ", ".join(map(str, test.case.values)) or "nothing"
        raise DataError(f"templates: chat_template takes a case's `messages`, or its `prompt`; it has {has}")
    first = [{"role": "system", "content": str(system)}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def _code_problems(prompts: Iterable[Prompt]) -> list[str]:
    """Python files of assertions that are not there or have no such function."""
    values = dict.fromkeys(str(one.value) for p in prompts for one in _flat(p.assertions) if one.type == "python")
    problems = []
    for value in values:
        try:
            UserCode.load(value)
        except UsageError as error:
            problems.append(str(error))
    return problems


def _flat(assertions: Iterable[Assertion]) -> Iterator[Assertion]:
    for assertion in assertions:
        yield assertion
        yield from _flat(assertion.inner)


def types_in(prompts: Iterable[Prompt]) -> set[str]:
    """Types of assertions in use."""
    return needed(assertion for prompt in prompts for assertion in prompt.assertions)


# Answers


class Answers:
    """The answers of a run in ``answers.jsonl``, by a digest of all that decides them: none is asked for twice.

    Answers of an earlier run are taken over too, where its record names the same weights. Failed ones are not kept.
    """

    def __init__(self, folder: Path, earlier: Path | None = None) -> None:
        self._path = folder / ANSWERS
        self._known: dict[str, Completion] = {}
        self.taken_over = 0
        if earlier is not None:
            for row in _records(earlier / ANSWERS):
                if row.get("fingerprint"):
                    self._known[row["key"]] = _completion(row)
        self._earlier = set(self._known)
        for row in _records(self._path):
            self._known[row["key"]] = _completion(row)
            self._earlier.discard(row["key"])

    def get(self, key: str) -> Completion | None:
        """A kept answer; one of an earlier run is written to this run's file, so that the file is complete."""
        found = self._known.get(key)
        if found is not None and key in self._earlier:
            self._earlier.discard(key)
            self.taken_over += 1
            self._write(key, "taken over", found)
        return found

    def add(self, key: str, fingerprint: str | None, answer: Completion) -> None:
        if answer.error is None:
            self._known[key] = answer
            self._write(key, fingerprint, answer)

    def _write(self, key: str, fingerprint: str | None, answer: Completion) -> None:
        line = json.dumps({"key": key, "fingerprint": fingerprint, **asdict(answer)}, ensure_ascii=False)
        # A line that a killed run left unfinished must not swallow the next one.
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(f"{line}\n".encode("utf-8", "backslashreplace"))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Whole records of the file; a line that was cut when a run was killed is passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "key" in row and "text" in row:
            yield row


def _completion(row: Mapping[str, Any]) -> Completion:
    return Completion(**{f.name: row[f.name] for f in fields(Completion) if f.name in row})


def answer_key(
    model: AnsweringModel, fingerprint: str | None, question: Question, generation: GenerationSettings, logprobs: bool
) -> str:
    """Digest of all that decides an answer. The batch does not: every answer is drawn by itself."""
    who = [model.base_url, model.model] if isinstance(model, EndpointSettings) else [fingerprint]
    how = generation.model_dump(exclude={"batch_size"})
    constrained = question.schema if isinstance(model, EndpointSettings) and model.constrain else None
    prompt = question.prompt if isinstance(question.prompt, str) else list(question.prompt)
    text = json.dumps([who, how, prompt, constrained, logprobs], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def ask(
    model: AnsweringModel,
    prompts: Sequence[Prompt],
    generation: GenerationSettings,
    answers: Answers,
    *,
    logprobs: bool,
    progress: Progress,
    stop: StopFlag,
) -> list[Completion]:
    """The model's answers to all prompts, in their order. A model all of whose answers are kept is not even loaded.

    Raises StoppedEarly when a stop is asked for: what was answered is kept. MissingError where there is no such model.
    """
    who = identity(model)
    questions = [Question(prompt.prompt, prompt.schema) for prompt in prompts]
    keys = [answer_key(model, who, question, generation, logprobs) for question in questions]
    found = {key: kept for key in keys if (kept := answers.get(key)) is not None}
    missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in found}
    if not missing:
        return [found[key] for key in keys]
    asked = list(missing)
    with (
        open_engine(model, generation) as engine,
        progress.task(f"{model.label} answers", total=len(missing), unit="prompts") as task,
        closing(engine.answer(list(missing.values()), logprobs=logprobs)) as made,
    ):
        for index, completion in made:
            found[asked[index]] = completion
            answers.add(asked[index], who, completion)
            task.advance()
            if stop.requested and len(found) < len(set(keys)):
                raise StoppedEarly(f"Stopped by {stop.reason}: {len(found)} of {len(set(keys))} answers are kept.")
        for note in engine.notes:
            progress.note(note)
    return [found[key] for key in keys]


class Judge:
    """The judge of ``llm-rubric``: its verdicts are kept with the answers, and it is loaded for the first new one only."""

    def __init__(
        self, model: AnsweringModel, generation: GenerationSettings, answers: Answers, stack: ExitStack
    ) -> None:
        self._model, self._generation, self._answers, self._stack = model, generation, answers, stack
        self._who = identity(model)
        self._engine: Engine | None = None

    def __call__(self, messages: list[Message]) -> str:
        """What the judge says. Raises MissingError where it does not answer."""
        question = Question(messages)
        key = answer_key(self._model, self._who, question, self._generation, False)
        found = self._answers.get(key)
        if found is None:
            if self._engine is None:
                self._engine = self._stack.enter_context(open_engine(self._model, self._generation))
            ((_, found),) = self._engine.answer([question])
            if found.error is not None:
                raise MissingError(f"the judge {self._model.label} does not answer: {found.error}")
            self._answers.add(key, self._who, found)
        return found.text


# Grading


def grade_case(prompt: Prompt, model: str, answer: Completion, helpers: Helpers) -> Outcome:
    """One answer with its grades."""
    test = prompt.test
    given = Given(
        answer.text, test.case.values, prompt.prompt, prompt.expected, answer.seconds, answer.tokens, answer.logprob, helpers
    )  # fmt: skip
    grades = tuple(grade(given, assertion) for assertion in prompt.assertions) if answer.error is None else ()
    passed, score = combine(grades, test.threshold) if answer.error is None else (False, 0.0)
    return Outcome(
        template=prompt.template, model=model, key=test.key, case=test.case.id, passed=passed, score=score,
        description=test.description, variables=test.case.values, prompt=prompt.prompt, output=answer.text,
        expected=prompt.expected, grades=grades, error=answer.error, tokens=answer.tokens,
        prompt_tokens=answer.prompt_tokens, seconds=answer.seconds, finished=answer.finished,
    )  # fmt: skip
