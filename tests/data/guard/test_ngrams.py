"""Texts as hashes: the same pieces for the same text, whatever it lies beside."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.guard import ngrams as module
from llmkit.data.guard.ngrams import characters, jaccard, ngrams, sets, shingles, unique_pairs, units

LANGUAGES = [
    "the quick brown fox jumps over the lazy dog",
    "나이키 운동화 270 당일 배송",
    "中文句子也在这里",
    "ひらがなとカタカナ",
]


def folded(text: str) -> str:
    chars = characters([text])
    return "".join(map(chr, chars.codes.tolist()))


def test_case_width_punctuation_and_blanks_do_not_count() -> None:
    assert folded("The  QUICK, brown-fox!\n") == "the quick brown fox"
    assert folded("ＡＢＣ　１２３") == "abc 123"
    assert folded("나이키 운동화, 270") == "나이키운동화270", "Korean blanks are set freely"
    assert folded("…!?") == ""


def test_shingles_are_six_letters_or_three_characters() -> None:
    assert shingles(["abcdefgh"]).counts.tolist() == [3]
    assert shingles(["中文句子也"]).counts.tolist() == [3]
    assert shingles(["abc", "", "!!", "中"]).counts.tolist() == [1, 0, 0, 1], "a shorter text is one piece"
    assert len(shingles([]).offsets) == 1


@given(st.lists(st.text(max_size=40), max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_text_has_the_same_pieces_alone_and_among_others(texts: list[str]) -> None:
    together = shingles(texts)
    words, mostly = units(texts)
    for place, text in enumerate(texts):
        alone = shingles([text])
        assert together.hashes[together.offsets[place] : together.offsets[place + 1]].tolist() == alone.hashes.tolist()
        word, most = units([text])
        assert words.hashes[words.offsets[place] : words.offsets[place + 1]].tolist() == word.hashes.tolist()
        assert mostly[place] == most[0]


@given(st.lists(st.sampled_from(["ab", "cde", "fgh", "中", "文", "나", "이", ",", "  "]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_units_are_words_and_single_characters(parts: list[str]) -> None:
    text = " ".join(parts)
    plain = unicodedata.normalize("NFKC", text)
    expected = re.findall(r"[a-z]+|[中文나이]", plain)
    found, _ = units([text])
    assert len(found.hashes) == len(expected)
    assert [expected.index(word) for word in expected] == [
        found.hashes.tolist().index(value) for value in found.hashes.tolist()
    ], "equal units have equal hashes, different ones different"


def test_a_change_of_one_word_changes_few_shingles() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
    other = [*words]
    other[7] = "acht"
    a, b = sets(shingles([" ".join(words), " ".join(other)]))
    assert 0.6 < jaccard(a, b) < 1


@pytest.mark.parametrize("text", LANGUAGES)
def test_long_lists_are_cut_into_parts_without_changing_anything(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{text} {n}" for n in range(40)]
    whole, (all_units, mostly) = shingles(texts), units(texts)
    monkeypatch.setattr(module, "AT_ONCE", 100)
    again, (parted, same) = shingles(texts), units(texts)
    assert np.array_equal(whole.hashes, again.hashes) and np.array_equal(whole.offsets, again.offsets)
    assert np.array_equal(all_units.hashes, parted.hashes) and np.array_equal(mostly, same)


def test_ngrams_stay_within_their_text() -> None:
    unit, _ = units(["a b c d", "e f", "g h i"])
    assert ngrams(unit, 3).counts.tolist() == [2, 0, 1]
    assert ngrams(unit, 3, np.array([False, True, True])).counts.tolist() == [0, 0, 1]
    one, two = units(["x b c d y"])[0], units(["b c d"])[0]
    assert ngrams(two, 3).hashes[0] in ngrams(one, 3).hashes


def test_different_pieces_have_different_hashes() -> None:
    texts = [f"{number:06d}" for number in range(100_000)]
    assert len(np.unique(shingles(texts).hashes)) == 100_000


def test_unique_pairs() -> None:
    a, b = unique_pairs(np.array([2, 1, 2, 1]), np.array([5, 9, 5, 3]))
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(1, 3), (1, 9), (2, 5)]
    assert len(unique_pairs(np.zeros(0, int), np.zeros(0, int))[0]) == 0
