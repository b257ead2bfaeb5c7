"""Demonstrations: which are shown for which case, and that a case is never shown itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import DataError
from llmkit.prompting.few_shot import Demonstrations
from llmkit.prompting.settings import FewShot

EXAMPLES = [
    {"q": "red running shoes", "c": "shoes", "a": "1"},
    {"q": "blue winter hat", "c": "hats", "a": "2"},
    {"q": "running shoes for men", "c": "shoes", "a": "3"},
    {"q": "leather belt", "c": "belts", "a": "4"},
    {"q": "summer hat", "c": "hats", "a": "5"},
]


def make(**settings: Any) -> Demonstrations:
    return Demonstrations(FewShot(examples=EXAMPLES, **{"key": "q"} | settings), variables=["q", "c"])


def answers(shown: list[dict[str, Any]]) -> str:
    return "".join(example["a"] for example in shown)


def test_fixed_takes_the_first() -> None:
    assert answers(make(count=3).pick({"q": "x"})) == "123"


@pytest.mark.parametrize("choose", ["fixed", "random", "nearest", "same"])
@pytest.mark.parametrize("typed", ["red running shoes", "  RED  running shoes", "ｒｅｄ running shoes"])
def test_a_case_is_never_shown_itself(choose: str, typed: str) -> None:
    settings = {"choose": choose, "count": 5} | ({"category": "c"} if choose == "same" else {})
    assert "1" not in answers(make(**settings).pick({"q": typed, "c": "shoes"}))


def test_nearest_shows_the_most_alike_last() -> None:
    assert answers(make(choose="nearest", count=2).pick({"q": "men's running shoes"})) == "13"


def test_same_keeps_to_the_category() -> None:
    picker = make(choose="same", category="c", count=4)
    assert answers(picker.pick({"q": "hat for running shoes", "c": "hats"})) in ("25", "52")
    assert picker.pick({"q": "anything", "c": "gloves"}) == []


def test_random_depends_on_seed_and_case_only() -> None:
    cases = [{"q": f"case {n}"} for n in range(20)]
    one, other = make(choose="random", count=2), make(choose="random", count=2, seed=1)
    forward = one.pick_all(cases)
    assert forward == one.pick_all(cases[::-1])[::-1]
    assert forward != other.pick_all(cases)
    assert len({answers(shown) for shown in forward}) > 5


def test_an_embedding_function_decides_when_it_is_given() -> None:
    asked: list[int] = []

    def embed(texts: Sequence[str]) -> list[list[float]]:
        asked.append(len(texts))
        return [[float("belt" in text), float("shoes" in text), 0.1] for text in texts]

    picker = Demonstrations(FewShot(examples=EXAMPLES, choose="nearest", count=1, key="q"), embed=embed)
    assert [answers(shown) for shown in picker.pick_all([{"q": "a belt"}, {"q": "two shoes"}])] == ["4", "1"]
    assert asked == [5, 2], "one call for the demonstrations, one for all cases"


def test_without_a_key_all_shared_variables_are_compared() -> None:
    picker = Demonstrations(
        FewShot(examples=EXAMPLES, choose="nearest", count=1), variables=["q", "c", "only in cases"]
    )
    assert answers(picker.pick({"q": "hat", "c": "hats"})) == "5"


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(TEXT, min_size=1, max_size=6), TEXT)
def test_any_text_can_be_compared(texts: list[str], query: str) -> None:
    rows = [{"q": text, "n": n} for n, text in enumerate(texts)]
    picker = Demonstrations(FewShot(examples=rows, choose="nearest", key="q", count=3))
    shown = picker.pick({"q": query})
    assert len(shown) <= 3
    assert all(example["q"] != query for example in shown if query.strip())


def test_a_file_is_looked_for_beside_the_template(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("q,a\nred hat,1\nblue coat,2\n", encoding="utf-8")
    picker = Demonstrations(FewShot(examples="e.csv", choose="nearest", key="q", count=1), folder=tmp_path)
    assert answers(picker.pick({"q": "coat"})) == "2"


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no demonstrations"), ('{"a": 1}\n', "no 'q'"), ("[1]\n", "not an object")],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "e.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        Demonstrations(FewShot(examples="e.jsonl", key="q"), folder=tmp_path)


def test_nothing_in_common_is_explained() -> None:
    with pytest.raises(DataError, match="no field in common"):
        Demonstrations(FewShot(examples=EXAMPLES, choose="nearest"), variables=["title"])
