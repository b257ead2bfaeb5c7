"""The cases of a prompt test: rows of files or of the recipe, each with its variables and what its answer has to be.

A row is one of three::

    {"vars": {"query": "…"}, "assert": [{"type": "contains", "value": "…"}], "description": "…", "threshold": 0.5,
     "templates": ["…"], "id": "…"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "assert": [...]}
    {"query": "…", "category": "…"}                     every column is a variable; also ``assert``, and ``__expected``

CSV files may have promptfoo's columns ``__expected`` (``contains: text``, ``levenshtein(5): text``, ``is-json``, or the
text that is to be equal), ``__expected2`` …, ``__description``, ``__threshold`` and ``__metric``;
``__templates`` names the templates that a row is for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.data import sources
from llmkit.data.rows import BadRow, Message
from llmkit.data.settings import DataSettings
from llmkit.errors import DataError
from llmkit.prompting.assertions import FOREIGN, KINDS, Assertion, Mistake, read
from llmkit.prompting.report import Case
from llmkit.recipe_hints import close

ROW_KEYS = ("id", "description", "templates", "vars", "assert", "threshold", "messages", "tools")
MOST_MISTAKES = 20


@dataclass(frozen=True)
class TestCase:
    """A case with what its answer has to be. ``key`` names it in every run, however the rows are ordered."""

    __test__ = False  # for pytest: this is no test

    case: Case
    key: str
    assertions: tuple[Assertion, ...] = ()
    threshold: float | None = None
    description: str = ""
    templates: tuple[str, ...] = ()
    """Names of the templates that it is for; empty for all."""


def read_cases(
    given: str | Sequence[str | Mapping[str, Any]], default_assert: Sequence[Any] = (), limit: int | None = None
) -> list[TestCase]:
    """All cases of a recipe, in order, at most ``limit``. ``default_assert`` goes behind what a case has itself.

    Raises DataError with every mistake of every row, or where there is no case.
    """
    always, wrong = read(list(default_assert), "default_assert")
    mistakes = [_words("the recipe", one) for one in wrong]
    made: list[TestCase] = []
    seen: dict[str, int] = {}
    for row_id, row in _rows(given):
        if limit is not None and len(made) >= limit:
            break
        if isinstance(row, BadRow):
            mistakes.append(str(row))
            continue
        case, wrong = read_case(row, row_id)
        mistakes += [_words(row_id, one) for one in wrong]
        if case is None:
            continue
        seen[case.key] = number = seen.get(case.key, 0) + 1
        key = case.key if number == 1 else f"{case.key}-{number}"
        made.append(replace(case, key=key, assertions=(*case.assertions, *always)))
    if mistakes:
        more = [f"and {len(mistakes) - MOST_MISTAKES} more"] if len(mistakes) > MOST_MISTAKES else []
        raise DataError("\n".join(["cases cannot be used:", *(f"  {m}" for m in [*mistakes[:MOST_MISTAKES], *more])]))
    if not made:
        raise DataError("cases: there is no case in it.")
    return made


def inline_mistakes(given: str | Sequence[Any]) -> Iterator[Mistake]:
    """What is wrong with the cases that stand in the recipe itself."""
    for index, row in enumerate([] if isinstance(given, str) else given):
        if isinstance(row, Mapping):
            for wrong in read_case(row, "")[1]:
                yield Mistake(f"cases.{index}.{wrong.key}".rstrip("."), wrong.message, wrong.hint)


def inline_assertions(given: str | Sequence[Any]) -> Iterator[Assertion]:
    """The assertions of the cases that stand in the recipe itself, as far as they are right."""
    for row in [] if isinstance(given, str) else given:
        if isinstance(row, Mapping) and (case := read_case(row, "")[0]) is not None:
            yield from case.assertions


def _words(where: str, mistake: Mistake) -> str:
    hint = f" ({mistake.hint})" if mistake.hint else ""
    return f"{where}: {mistake.key}: {mistake.message}{hint}"


def _rows(given: str | Sequence[str | Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    for index, entry in enumerate([given] if isinstance(given, str) else given):
        if isinstance(entry, Mapping):
            yield f"case {index + 1}", entry
            continue
        settings = DataSettings(train=entry)
        for source in sources.train_sources(settings, "cases" if isinstance(given, str) else f"cases[{index}]"):
            for row in sources.read(source):
                yield row.row_id, row if isinstance(row, BadRow) else row.data


def case_files(given: str | Sequence[str | Mapping[str, Any]]) -> DataSettings | None:
    """The files of cases as data sources; None where all cases stand in the recipe."""
    named: list[Any] = [entry for entry in ([given] if isinstance(given, str) else given) if isinstance(entry, str)]
    return DataSettings(train=named) if named else None


def read_case(row: Mapping[str, Any], row_id: str) -> tuple[TestCase | None, list[Mistake]]:
    """One row, or what is wrong with it."""
    wrong: list[Mistake] = []
    row = {str(key): value for key, value in row.items() if key is not None}
    flat = "vars" not in row
    if not flat:
        wrong += _unknown_keys(row)
    variables = _variables(row, flat, wrong)
    assertions = _assertions(row, wrong)
    messages = _messages(row.get("messages"), wrong) if row.get("messages") is not None else None
    threshold = _threshold(row.get("threshold") if not flat else row.get("__threshold"), wrong)
    description = row.get("__description") if flat else row.get("description")
    templates = _names(row.get("__templates") if flat else row.get("templates"), wrong)
    if wrong:
        return None, wrong
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        answer, messages = str(messages[-1].get("content") or ""), messages[:-1]
    given = row.get("id") if not flat or messages is not None else None
    case = Case(
        id=str(given if given is not None else row_id), values=variables, messages=messages,
        tools=_tools(row.get("tools")) if messages is not None else None, answer=answer,
    )  # fmt: skip
    key = str(given) if given is not None else _digest([variables, messages])
    return TestCase(case, key, tuple(assertions), threshold, str(description or ""), templates), []


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _unknown_keys(row: Mapping[str, Any]) -> Iterator[Mistake]:
    for key in row:
        if key not in ROW_KEYS:
            likely = close(key, ROW_KEYS)
            yield Mistake(
                key,
                "unknown key",
                f"did you mean `{likely}`?" if likely else f"a case with `vars` has {', '.join(ROW_KEYS)}",
            )


def _variables(row: Mapping[str, Any], flat: bool, wrong: list[Mistake]) -> dict[str, Any]:
    if not flat:
        found = row["vars"]
        if isinstance(found, Mapping):
            return dict(found)
        wrong.append(Mistake("vars", "must be a mapping of names to values"))
        return {}
    no_variable = {"assert"} | ({"messages", "tools", "id"} if row.get("messages") is not None else set())
    return {key: value for key, value in row.items() if key not in no_variable and not key.startswith("__")}


def _names(value: Any, wrong: list[Mistake]) -> tuple[str, ...]:
    """Template names: a list, or one text with commas between them."""
    found = [part.strip() for part in value.split(",")] if isinstance(value, str) else value or []
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        wrong.append(Mistake("templates", "must be a list of names of templates"))
        return ()
    return tuple(found)


def _threshold(value: Any, wrong: list[Mistake]) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= 1:
        wrong.append(Mistake("threshold", f"must be a number from 0 to 1, got {value!r}"))
    return number


def _messages(value: Any, wrong: list[Mistake]) -> list[Message]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # said below
            value = json.loads(value)
    good = isinstance(value, list) and value and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip
    if not good:
        wrong.append(Mistake("messages", "must be a list of mappings with `role` and `content`"))
        return []
    if not any(message["role"] == "user" for message in value):
        wrong.append(Mistake("messages", "have no message of the user"))
    return [dict(message) for message in value]


def _tools(value: Any) -> list[dict[str, Any]] | None:
    found = json.loads(value) if isinstance(value, str) and value else value
    return [dict(tool) for tool in found] if found else None


def _assertions(row: Mapping[str, Any], wrong: list[Mistake]) -> list[Assertion]:
    entries = row.get("assert")
    if isinstance(entries, str):  # a cell of a CSV file
        try:
            entries = json.loads(entries) if entries.strip() else None
        except ValueError as error:
            wrong.append(Mistake("assert", f"is no JSON: {error}"))
            entries = None
    made: list[Assertion] = []
    if entries is not None:
        made, mistakes = read(entries)
        wrong += mistakes
    for column in sorted(key for key in row if re.fullmatch(r"__expected\d*", key)):
        text = row[column]
        if isinstance(text, str) and text.strip():
            found, mistakes = read([_expected(text.strip(), row.get("__metric"))], column)
            made += found
            wrong += [Mistake(column, one.message, one.hint) for one in mistakes]
    return made


_EXPECTED = re.compile(r"(?P<type>[a-z][a-z-]*)(?:\((?P<threshold>\d*\.?\d+)\))?(?::\s*(?P<value>.*))?", re.DOTALL)
_SHORT = {"grade": "llm-rubric", "fn": "javascript", "eval": "javascript"}


def _expected(text: str, metric: Any) -> dict[str, Any]:
    """promptfoo's short form of an assertion, as a cell holds it; any other text is what the answer has to equal."""
    found = _EXPECTED.fullmatch(text)
    name = _SHORT.get(found["type"], found["type"]) if found else ""
    if found is None or name.removeprefix("not-") not in {*KINDS, *FOREIGN} or (
        # the label `similar` or `contains` alone is a text; a type that wants a value has a colon
        found["value"] is None and found["threshold"] is None and KINDS.get(name.removeprefix("not-"), KINDS["contains"]).wrong(None)
    ):  # fmt: skip
        return {"type": "equals", "value": text} | ({"metric": metric} if metric else {})
    entry: dict[str, Any] = {"type": name}
    if found["value"]:
        entry["value"] = found["value"]
    if found["threshold"]:
        entry["threshold"] = float(found["threshold"])
    if metric:
        entry["metric"] = metric
    return entry
