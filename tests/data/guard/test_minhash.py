"""MinHash against the similarity that it estimates, and clusters against the true graph."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.data.guard.minhash import Bands, Clusters, MinHasher, join_near, rows_in_a_band
from llmkit.data.guard.ngrams import Pieces, jaccard, sets, shingles


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """400 texts, and for each one a copy with one to seven other words."""
    chosen = random.Random(3)
    words = ["".join(chosen.choices("abcdefghijklmnop", k=chosen.randint(3, 8))) for _ in range(3_000)]
    base = [chosen.choices(words, k=50) for _ in range(400)]
    copies = []
    for row in base:
        other = [*row]
        for _ in range(chosen.randint(1, 7)):
            other[chosen.randrange(50)] = chosen.choice(words)
        copies.append(other)
    return [" ".join(row) for row in [*base, *copies]]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("permutations", [32, 128, 256])
def test_bands_find_99_percent_of_the_pairs_at_the_threshold(threshold: float, permutations: int) -> None:
    rows = rows_in_a_band(threshold, permutations)
    bands = permutations // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    fewer = permutations // (rows + 1)
    assert rows == permutations or 1 - (1 - threshold ** (rows + 1)) ** fewer < 0.99, "longer bands would do too"


def test_the_estimate_has_no_bias_and_the_spread_of_the_theory(texts: list[str]) -> None:
    signatures, _ = MinHasher(0.8, 128)(shingles(texts))
    owned = list(sets(shingles(texts)))
    true = np.array([jaccard(owned[n], owned[n + 400]) for n in range(400)])
    error = (signatures[:400] == signatures[400:]).mean(axis=1) - true
    spread = np.sqrt((true * (1 - true) / 128).mean())
    assert abs(error.mean()) < 3 * spread / np.sqrt(400)
    assert 0.85 * spread < error.std() < 1.15 * spread


def test_clusters_are_those_of_the_true_similarity(texts: list[str], tmp_path: Path) -> None:
    hasher = MinHasher(0.8, 128)
    bands = Bands(tmp_path, hasher)
    for start in range(0, 800, 300):
        bands.append(*hasher(shingles(texts[start : start + 300])))
    owned = list(sets(shingles(texts)))

    def similar(pairs: Any) -> Any:
        return np.array([jaccard(owned[a], owned[b]) >= 0.8 for a, b in pairs.tolist()], bool)

    clusters = Clusters(800)
    compared = join_near(bands, np.arange(800), 0.8, similar, clusters)
    labels = clusters.labels()
    near = np.array([jaccard(owned[n], owned[n + 400]) >= 0.8 for n in range(400)])
    assert 100 < near.sum() < 300
    found = labels[:400] == labels[400:]
    assert found[near].mean() >= 0.98
    assert not found[~near].any()
    assert compared < 1_000, "of 319,600 pairs"
    assert labels[:400].tolist() == list(range(400)), "the first row stands for its cluster"


def test_a_bucket_of_equal_rows_costs_one_comparison_each(tmp_path: Path) -> None:
    hasher = MinHasher(0.8, 64)
    bands = Bands(tmp_path, hasher)
    bands.append(*hasher(shingles(["the very same text again and again"] * 500)))
    asked = 0

    def similar(pairs: Any) -> Any:
        nonlocal asked
        asked += len(pairs)
        return np.ones(len(pairs), bool)

    clusters = Clusters(500)
    join_near(bands, np.arange(500), 0.8, similar, clusters)
    assert asked == 499
    assert set(clusters.labels().tolist()) == {0}


def test_texts_without_letters_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    hasher = MinHasher(0.8, 64)
    bands = Bands(tmp_path, hasher)
    bands.append(*hasher(shingles(["!!!", "???", "abc def ghi"])))
    clusters = Clusters(3)
    join_near(bands, np.arange(3), 0.8, lambda pairs: np.ones(len(pairs), bool), clusters)
    assert clusters.labels().tolist() == [0, 1, 2]


def test_chains_are_one_cluster() -> None:
    clusters = Clusters(6)
    clusters.unite_pairs(np.array([[4, 5], [3, 4], [1, 3]]))
    assert clusters.labels().tolist() == [0, 1, 2, 1, 1, 1]


def test_no_rows_at_all() -> None:
    signatures, keys = MinHasher(0.8, 64)(Pieces(np.zeros(0, np.uint64), np.zeros(1, np.int64)))
    assert len(signatures) == len(keys) == 0
