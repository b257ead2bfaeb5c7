"""The index of test n-grams: what is found in which training row, and what does not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmkit.data.guard.leaks import PHRASE_ROWS, TEMPLATE_ROWS, LeakIndex, Overlaps, entries

N = 4


def index_of(texts: list[str], folder: Path) -> LeakIndex:
    LeakIndex.build([entries(texts, np.arange(len(texts)), N)], len(texts)).save(folder)
    return LeakIndex.open(folder)


def leaks(index: LeakIndex, rows: list[str], share: float) -> list[tuple[int, int, float]]:
    overlaps = Overlaps(index)
    for start in range(0, len(rows), 7):
        found, grams = index.look(rows[start : start + 7], N)
        overlaps.add(found + start, grams)
    return overlaps.leaks(share)


def test_the_share_of_a_text_in_one_row(tmp_path: Path) -> None:
    index = index_of(["a b c d e f g h", "p q r s t u v w"], tmp_path)
    rows = ["x A b, c d e f g h y", "a b c d e f g z", "p q r s", "a b c d p q r s"]
    assert leaks(index, rows, 0.7) == [(0, 0, 1.0), (1, 0, 0.8)]
    assert [(row, test) for row, test, _ in leaks(index, rows, 0.2)] == [(0, 0), (1, 0), (2, 1), (3, 0), (3, 1)]


def test_a_passage_that_comes_twice_counts_once(tmp_path: Path) -> None:
    index = index_of(["a b c d e f g h"], tmp_path)
    ((_, _, share),) = leaks(index, ["a b c d x a b c d x a b c d"], 0.1)
    assert share == pytest.approx(1 / 5)


def test_template_of_the_test_set_and_phrases_of_the_training_rows_do_not_count(tmp_path: Path) -> None:
    template = "please answer the following question"
    tests = [f"{template} q{n} w{n} e{n} r{n}" for n in range(TEMPLATE_ROWS + 2)]
    index = index_of(tests, tmp_path)
    assert leaks(index, [f"{template} other words here"], 0.1) == []
    assert [row for row, *_ in leaks(index, ["q3 w3 e3 r3"], 0.1)] == [0]
    phrase = ["once upon a time there was"]
    index = index_of(phrase, tmp_path)
    assert len(leaks(index, [f"{n} once upon a time there was" for n in range(PHRASE_ROWS)], 0.7)) == PHRASE_ROWS
    assert leaks(index, [f"{n} once upon a time there was" for n in range(PHRASE_ROWS + 1)], 0.7) == []


def test_texts_shorter_than_an_ngram_and_no_tests_at_all(tmp_path: Path) -> None:
    assert leaks(index_of(["a b c"], tmp_path), ["a b c d e f"], 0.1) == []
    assert leaks(index_of([], tmp_path), ["a b c d e f"], 0.1) == []
