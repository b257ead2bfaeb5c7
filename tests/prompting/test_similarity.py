"""Text distances against the numbers of rapidfuzz 3.14.6, rouge-score 0.1.2 and sacrebleu 2.6.0.

The numbers were taken from those packages (``Levenshtein.distance``; ``RougeScorer(["rouge1", "rouge2"])``, F1;
``sentence_bleu(hypothesis, references)``, its ``zh`` tokenizer for Chinese), which 2,000 random texts agreed with to 1e-9.
"""

from __future__ import annotations

import pytest

from llmkit.prompting.similarity import bleu, bleu_units, levenshtein, rouge_n, units


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2), ("무선 이어폰", "무선이어폰", 1),
        ("蓝牙耳机降噪", "降噪蓝牙耳机", 4), ("the cat sat on the mat", "the cat is on the mat", 3),
    ],
)  # fmt: skip
def test_levenshtein_is_rapidfuzzs(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@pytest.mark.parametrize(
    ("text", "reference", "one", "two"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 0.8333333333333334, 0.6),
        ("wireless mouse, 2.4 GHz", "a wireless mouse (2.4 GHz)", 0.9090909090909091, 0.8888888888888888),
        ("The Cat", "the cat", 1.0, 1.0),
        ("nothing in common", "wholly other words", 0.0, 0.0),
        ("", "the cat", 0.0, 0.0),
    ],
)
def test_rouge_is_rouge_scores(text: str, reference: str, one: float, two: float) -> None:
    assert rouge_n(text, [reference]) == pytest.approx(one)
    assert rouge_n(text, [reference], 2) == pytest.approx(two)


def test_rouge_takes_the_best_reference_and_cjk_by_character() -> None:
    assert rouge_n("the cat", ["a dog", "the cat"]) == 1.0
    assert units("블루투스 이어폰 BT5.0 蓝牙") == [*"블루투스이어폰", "bt5", "0", "蓝", "牙"]
    assert rouge_n("蓝牙耳机降噪", ["降噪蓝牙耳机"], 2) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        ("the cat sat on the mat", ["the cat is on the mat"], 0.3799178428257963),
        ("wireless mouse, 2.4 GHz", ["a wireless mouse (2.4 GHz)"], 0.20252884954471365),
        ("the cat is on the mat", ["the cat is on the mat"], 1.0),
        ("a 3.", ["1,000.5 a.b", "1,000.5 U.S. ."], 0.24840753130578644),
        ("no word of it", ["something else entirely here"], 0.0),
        ("", ["x"], 0.0),
    ],
)
def test_bleu_is_sacrebleus(text: str, references: list[str], score: float) -> None:
    assert bleu(text, references) == pytest.approx(score)


def test_bleu_splits_as_13a_does_and_cjk_by_character() -> None:
    assert bleu_units("It's 1,000.5 (or 3-4) a.b, well-known.") == [
        "It's", "1,000.5", "(", "or", "3", "-", "4", ")", "a", ".", "b", ",", "well-known", ".",
    ]  # fmt: skip
    assert bleu_units("蓝牙耳机，好。") == ["蓝", "牙", "耳", "机", "，", "好", "。"]
    # sacrebleu's own `zh` tokenizer gives the same
    assert bleu("蓝牙耳机降噪", ["降噪蓝牙耳机"]) == pytest.approx(0.6042750794713536)
