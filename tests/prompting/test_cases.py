"""Cases as files and recipes have them: variables, conversations, promptfoo's CSV columns, and every mistake at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.errors import DataError
from llmkit.prompting.cases import inline_mistakes, read_cases


def test_three_shapes_of_a_row(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    rows = [
        {"vars": {"query": "a"}, "assert": [{"type": "contains", "value": "x"}], "id": "one", "threshold": 0.5},
        {"query": "b", "id": 7, "assert": [{"type": "is-json"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "note": "n"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = read_cases(str(file), [{"type": "not-contains", "value": "sorry"}])
    assert (first.key, first.case.id, first.threshold) == ("one", "one", 0.5)
    assert [one.label for one in first.assertions] == ["contains", "not-contains"]
    assert second.case.values == {"query": "b", "id": 7}, "a column called id is a variable"
    assert second.case.id == f"{file}:2"
    assert third.case.messages == [{"role": "user", "content": "hi"}]
    assert (third.case.answer, third.case.values) == ("hello", {"note": "n"})


def test_the_key_of_a_case_does_not_depend_on_order_or_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "1"}\n{"q": "2"}\n{"q": "1"}\n')
    (tmp_path / "b.csv").write_text("q\n2\n1\n1\n")
    first = [case.key for case in read_cases(str(tmp_path / "a.jsonl"))]
    second = [case.key for case in read_cases(str(tmp_path / "b.csv"))]
    assert len(set(first)) == 3, "the same row twice is two cases"
    assert sorted(first) == sorted(second)


def test_promptfoos_csv(tmp_path: Path) -> None:
    file = tmp_path / "cases.csv"
    file.write_text(
        "query,__expected,__expected2,__description,__threshold,__metric\n"
        "a,contains: Sony,not-icontains-any:sorry;x,first,0.5,tone\n"
        "b,levenshtein(5): kitten,is-json,,,\n"
        "c,블루투스 이어폰,,,,\n"
        "d,\"contains-any: a, b\",,,,\n"
        "e,contains,,,,\n"
    )  # fmt: skip
    made = read_cases(str(file))
    found = [[(one.label, one.value, one.threshold) for one in case.assertions] for case in made]
    assert found == [
        [("contains", "Sony", None), ("not-icontains-any", "sorry;x", None)],
        [("levenshtein", "kitten", 5.0), ("is-json", None, None)],
        [("equals", "블루투스 이어폰", None)],
        [("contains-any", "a, b", None)],
        [("equals", "contains", None)],
    ]
    assert (made[0].description, made[0].threshold, made[0].assertions[0].metric) == ("first", 0.5, "tone")
    assert made[0].case.values == {"query": "a"}


def test_cases_in_the_recipe_files_and_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "1"}\n{"q": "2"}\n')
    given = [{"vars": {"q": "0"}}, str(tmp_path / "*.jsonl")]
    assert [case.case.values["q"] for case in read_cases(given)] == ["0", "1", "2"]
    assert [case.case.id for case in read_cases(given, limit=2)] == ["case 1", f"{tmp_path}/a.jsonl:1"]


def test_every_mistake_of_every_row_is_told(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(
        '{"vars": {"q": 1}, "assert": [{"type": "contians", "value": "x"}]}\n'
        "not json\n"
        '{"vars": [], "asert": []}\n'
        '{"messages": [{"role": "user"}]}\n'
        '{"vars": {}, "threshold": 2}\n'
    )
    with pytest.raises(DataError) as raised:
        read_cases(str(file), [{"type": "nothing-like-it"}])
    said = str(raised.value)
    assert f"{file}:1: assert.0.type: there is no assertion 'contians' (did you mean `contains`?)" in said
    assert f"{file}:2: invalid JSON" in said
    assert f"{file}:3: asert: unknown key (did you mean `assert`?)" in said
    assert f"{file}:3: vars: must be a mapping" in said
    assert f"{file}:4: messages: must be a list" in said
    assert f"{file}:5: threshold: must be a number from 0 to 1" in said
    assert "the recipe: default_assert.0.type" in said


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cases: .*none\.jsonl does not exist"):
        read_cases(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no case"):
        read_cases(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no message of the user"):
        read_cases([{"messages": [{"role": "system", "content": "x"}]}])


def test_mistakes_of_the_recipe_have_its_keys() -> None:
    rows = [{"vars": {}}, {"vars": {}, "assert": [{"type": "regex", "value": "("}]}, "file.jsonl"]
    assert [one.key for one in inline_mistakes(rows)] == ["cases.1.assert.0.value"]
