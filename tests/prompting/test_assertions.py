"""Assertions: what each passes and fails, how they are written, and that every mistake is told before a run."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmkit.errors import DataError
from llmkit.prompting.assertions import (
    KINDS,
    LANGUAGES,
    Assertion,
    Given,
    Grade,
    Helpers,
    combine,
    for_case,
    grade,
    needed,
    read,
)

SCHEMA = {"type": "object", "required": ["brand"], "properties": {"brand": {"type": "string"}}}


def check(entry: dict[str, Any], output: str = "", **given: Any) -> Grade:
    """The grade of one assertion, written as in a recipe."""
    made, wrong = read([entry])
    assert wrong == []
    variables = given.pop("variables", {})
    return grade(Given(output, variables, **given), for_case(made[0], variables))


# type, value, threshold, an answer that passes, one that does not
EXAMPLES: list[tuple[str, Any, float | None, str, str]] = [
    ("equals", "무선 이어폰", None, " 무선 이어폰\n", "무선 이어폰."),
    ("equals", {"a": [1, 2]}, None, '{"a": [1,2]}', '{"a": [2,1]}'),
    ("equals", 7, None, "7", "8"),
    ("contains", "Sony", None, "by Sony.", "by sony."),
    ("icontains", "SONY", None, "by Sony.", "by LG."),
    ("contains-any", ["a1", "b2"], None, "x b2", "x"),
    ("contains-any", "a1, b2", None, "x b2", "a1b"[:1]),
    ("contains-all", ["a1", "b2"], None, "b2 a1", "b2"),
    ("icontains-any", ["A1", "B2"], None, "x b2", "x"),
    ("icontains-all", ["A1", "B2"], None, "b2 a1", "b2"),
    ("starts-with", "Title:", None, "Title: x", " Title: x"),
    ("regex", r"^\d{3}-\d{4}$", None, "123-4567", "x 123-4567"),
    ("one-of", ["구매", "정보"], None, "구매\n", "구매 의도"),
    ("one-of", "buy, info", None, "info", "information"),
    ("language", "ko", None, "블루투스 이어폰을 추천합니다", "我推荐这款蓝牙耳机"),
    ("language", "zh", None, "我推荐这款蓝牙耳机", "This is the one that I would buy for you"),
    ("language", "en", None, "Sony WH-1000XM5", "블루투스 이어폰을 추천합니다"),
    ("is-json", None, None, '{"a": 1}', "so: {}"),
    ("is-json", SCHEMA, None, '{"brand": "Sony"}', '{"brand": 5}'),
    ("contains-json", SCHEMA, None, 'Sure: [1] {"brand": "LG"} done', 'Sure: {"brnd": "LG"}'),
    ("levenshtein", "kitten", 3, "sitting", "sitting up"),
    ("rouge-n", "the cat is on the mat", 0.8, "the cat sat on the mat", "a dog"),
    ("bleu", "the cat is on the mat", 0.3, "the cat sat on the mat", "mat the on sat cat"),
    ("python", "len(output) < 5 and context['vars'] == {}", None, "1234", "12345"),
    ("python", "if not output:\n    return False\nreturn {'score': len(output) / 10}", 0.5, "12345", "1"),
]


@pytest.mark.parametrize(("name", "value", "threshold", "good", "bad"), EXAMPLES, ids=lambda v: str(v)[:20])
def test_it_passes_and_fails_and_so_does_its_opposite(
    name: str, value: Any, threshold: float | None, good: str, bad: str
) -> None:
    entry = {"type": name} | ({"value": value} if value is not None else {})
    entry |= {"threshold": threshold} if threshold is not None else {}
    passed, failed = check(entry, good), check(entry, bad)
    assert (passed.passed, failed.passed) == (True, False)
    assert 0 <= failed.score <= passed.score <= 1
    assert failed.reason
    opposite = entry | {"type": f"not-{name}"}
    assert (check(opposite, good).passed, check(opposite, bad).passed) == (False, True)
    assert check(opposite, good).type == f"not-{name}"


def test_the_numbers_of_an_answer() -> None:
    assert check({"type": "latency", "threshold": 500}, seconds=0.4).passed
    assert not check({"type": "latency", "threshold": 500}, seconds=0.6).passed
    assert check({"type": "tokens", "threshold": 10}, tokens=10).passed
    assert not check({"type": "tokens", "threshold": 10}, tokens=11).passed
    two = math.log(0.5)  # a model that gives each token one half has the perplexity 2
    assert check({"type": "perplexity", "threshold": 2.0001}, logprob=two).passed
    assert not check({"type": "perplexity", "threshold": 1.9}, logprob=two).passed
    assert check({"type": "perplexity-score", "threshold": 0.33}, logprob=two).score == pytest.approx(1 / 3)
    for name in ("latency", "tokens", "perplexity"):
        found = check({"type": name, "threshold": 1})
        assert not found.passed
        assert "does not tell" in found.reason


class Found(NamedTuple):
    kind: str


def test_helpers_are_asked() -> None:
    vectors = {"gift": [1.0, 0.0], "present": [0.8, 0.6], "car": [0.0, 1.0]}
    helpers = Helpers(
        embed=lambda texts: [vectors[text] for text in texts],
        judge=lambda messages: (
            f'Well: {{"pass": {str("good" in messages[0]["content"]).lower()}, "score": 0.9, "reason": "r"}}'
        ),
        find_pii=lambda text: [Found("email")] if "@" in text else [],
    )
    similar = {"type": "similar", "value": ["car", "present"], "threshold": 0.79}
    assert check(similar, "gift", helpers=helpers).score == pytest.approx(0.8)
    assert not check(similar | {"threshold": 0.81}, "gift", helpers=helpers).passed
    assert check({"type": "llm-rubric", "value": "is good"}, "x", helpers=helpers).passed
    assert not check({"type": "llm-rubric", "value": "is kind"}, "x", helpers=helpers).passed
    assert not check({"type": "llm-rubric", "value": "is good", "threshold": 0.95}, "x", helpers=helpers).passed
    found = check({"type": "no-pii"}, "kim@corp.kr", helpers=helpers)
    assert not found.passed
    assert "email" in found.reason
    assert "kim" not in found.reason


def test_a_judge_that_talks_is_no_verdict() -> None:
    helpers = Helpers(judge=lambda _: "I think it is fine.")
    found = check({"type": "llm-rubric", "value": "is good"}, "x", helpers=helpers)
    assert not found.passed
    assert "no verdict" in found.reason


def test_sets_weights_and_thresholds() -> None:
    entry = {
        "type": "assert-set", "threshold": 0.5,
        "assert": [{"type": "contains", "value": "a", "weight": 3}, {"type": "contains", "value": "b"}],
    }  # fmt: skip
    found = check(entry, "a")
    assert (found.passed, found.score) == (True, 0.75)
    assert "lacks 'b'" in found.reason
    assert not check(entry, "b").passed
    assert not check({k: v for k, v in entry.items() if k != "threshold"}, "a").passed
    grades = [Grade("x", True, 1.0, ""), Grade("y", False, 0.0, "", weight=0)]
    assert combine(grades, None) == (True, 1.0), "an assertion of weight 0 is only reported"
    assert combine([], None) == (True, 1.0)


def test_variables_in_values() -> None:
    variables = {"brand": "Sony", "labels": ["buy", "info"], "schema": SCHEMA}
    assert check({"type": "contains", "value": "by {{ brand }}"}, "by Sony", variables=variables).passed
    assert check({"type": "one-of", "value": "{{ labels }}"}, "info", variables=variables).passed
    assert check({"type": "is-json", "value": "{{ schema }}"}, '{"brand": "a"}', variables=variables).passed
    assert check({"type": "contains-all", "value": ["{{brand}}", "x"]}, "x Sony", variables=variables).passed
    (missing,), _ = read([{"type": "contains", "value": "{{ model }}"}])
    with pytest.raises(DataError, match=r"contains.*'model' is undefined.*brand, labels"):
        for_case(missing, variables)
    (wrong,), _ = read([{"type": "regex", "value": "{{ brand }}("}])
    with pytest.raises(DataError, match="no regular expression"):
        for_case(wrong, variables)


def test_python_functions_by_path(tmp_path: Path) -> None:
    file = tmp_path / "checks.py"
    file.write_text(
        "def short(output, context):\n    return len(output) <= context['vars']['most']\n"
        "def broken(output, context):\n    raise ValueError('no way')\n"
        "def get_assert(output, context):\n    return {'pass': False, 'score': 0.25, 'reason': 'because'}\n",
    )
    given = {"variables": {"most": 3}}
    assert check({"type": "python", "value": f"{file}:short"}, "abc", **given).passed
    assert not check({"type": "python", "value": f"file://{file}:short"}, "abcd", **given).passed
    assert check({"type": "python", "value": str(file)}, "x", **given) == Grade("python", False, 0.25, "because")
    found = check({"type": "python", "value": f"{file}:broken"}, "x")
    assert found.reason == "the Python code failed: ValueError: no way"
    assert "gave str" in check({"type": "python", "value": "output"}, "x").reason


@pytest.mark.parametrize(
    ("entry", "key", "said"),
    [
        ({"type": "contians", "value": "x"}, "type", "`contains`"),
        ({"type": "not-icontain", "value": "x"}, "type", "`icontains`"),
        ({"type": "javascript", "value": "x"}, "type", "use `python`"),
        ({"type": "contains"}, "value", "needs a value"),
        ({"type": "contains", "value": ""}, "value", "every answer would pass"),
        ({"type": "contains-any", "value": []}, "value", "a list of texts"),
        ({"type": "regex", "value": "("}, "value", "no regular expression"),
        ({"type": "is-json", "value": {"type": "objekt"}}, "value", "no JSON schema"),
        ({"type": "is-json", "value": 5}, "value", "a mapping"),
        ({"type": "language", "value": "klingon"}, "value", "one of ko"),
        ({"type": "latency"}, "threshold", "needs a threshold"),
        ({"type": "contains", "value": "x", "threshold": 1}, "threshold", "has no threshold"),
        ({"type": "bleu", "value": "x", "threshold": -1}, "threshold", "at least 0"),
        ({"type": "bleu", "value": "x", "weigth": 2}, "weigth", "`weight`"),
        ({"type": "bleu", "value": "x", "n": 2}, "n", "rouge-n"),
        ({"type": "python", "value": "len(output"}, "value", "nor Python"),
        ({"type": "contains", "value": "{{ a"}, "value", "Jinja"),
        ({"type": "no-pii", "value": "x"}, "value", "takes no value"),
        ({"type": "assert-set", "assert": [{"type": "equal", "value": 1}]}, "assert.0.type", "`equals`"),
        ({"type": "assert-set"}, "assert", "list of assertions"),
        ({"type": "equals", "value": 1, "assert": []}, "assert", "assert-set"),
        ({"value": "x"}, "type", "needs a `type`"),
    ],
)
def test_every_mistake_is_told_with_its_key(entry: dict[str, Any], key: str, said: str) -> None:
    made, wrong = read([{"type": "contains", "value": "fine"}, entry])
    assert len(made) == 1
    assert [one.key for one in wrong] == [f"assert.1.{key}"]
    assert said in wrong[0].message + wrong[0].hint


def test_all_mistakes_come_at_once() -> None:
    _, wrong = read([{"type": "x"}, "text", {"type": "regex", "value": "("}], "default_assert")
    assert [one.key for one in wrong] == ["default_assert.0.type", "default_assert.1", "default_assert.2.value"]
    assert read({"type": "equals"})[1][0].message == "must be a list of assertions"


def test_every_kind_has_an_example_here_and_a_line_in_the_docs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/prompt-test.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        assert f"| `{name}` | {kind.help}" in page, name
    shown = {name for name, *_ in EXAMPLES} | {
        "latency", "tokens", "perplexity", "perplexity-score", "similar", "llm-rubric", "no-pii", "assert-set",
    }  # fmt: skip
    assert set(KINDS) == shown


def test_the_languages_are_those_that_are_told() -> None:
    from llmkit.data.guard import language

    assert set(LANGUAGES) == set(language.LANGUAGES)


def test_reading_assertions_loads_nothing_heavy() -> None:
    code = (
        "import sys; from llmkit.prompting.assertions import read; from llmkit.prompting.cases import inline_mistakes\n"
        "assert not read([{'type': 'language', 'value': 'ko'}, {'type': 'bleu', 'value': 'x'}])[1]\n"
        "assert not list(inline_mistakes([{'vars': {}}]))\n"
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_is_needed_is_seen_in_sets_too() -> None:
    inner = Assertion("similar")
    assert needed([Assertion("assert-set", inner=(inner,)), Assertion("bleu")]) == {"assert-set", "similar", "bleu"}
