"""How well labels agree: Cohen's kappa, Krippendorff's alpha, accuracy, macro F1, calibration error. Numpy only.

Labels are whole numbers from 0; ``MISSING`` (-1) is no label. Every function leaves rows out that lack one, and gives
NaN where nothing is left to measure or the measure is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
MISSING = -1


def as_labels(values: Sequence[int] | NDArray[Any]) -> Labels:
    return np.asarray(values, dtype=np.int64)


def accuracy(found: Labels, gold: Labels) -> float:
    """Share of equal labels among the rows [n] that have both."""
    both = (found != MISSING) & (gold != MISSING)
    return float((found[both] == gold[both]).mean()) if both.any() else float("nan")


def f1_scores(found: Labels, gold: Labels) -> dict[int, float]:
    """F1 of every label that the gold labels or those found have, over the rows with a gold label.

    A row without a label counts against its gold label (a miss), so that abstaining does not raise the score.
    """
    known = gold != MISSING
    found, gold = found[known], gold[known]
    scores = {}
    for label in np.unique(np.concatenate([gold, found[found != MISSING]])):
        hit = int(((found == label) & (gold == label)).sum())
        said, true = int((found == label).sum()), int((gold == label).sum())
        scores[int(label)] = 2 * hit / (said + true)
    return scores


def macro_f1(found: Labels, gold: Labels) -> float:
    """Mean of :func:`f1_scores`, every label counting the same."""
    scores = f1_scores(found, gold)
    return sum(scores.values()) / len(scores) if scores else float("nan")


def cohen_kappa(one: Labels, other: Labels) -> float:
    """Agreement of two raters beyond chance (Cohen, 1960: A coefficient of agreement for nominal scales).

    1 is perfect, 0 what chance gives; NaN where both always give one and the same label, so that chance explains all.
    """
    both = (one != MISSING) & (other != MISSING)
    if not both.any():
        return float("nan")
    one, other = one[both], other[both]
    size = int(max(one.max(), other.max())) + 1
    first, second = np.bincount(one, minlength=size) / len(one), np.bincount(other, minlength=size) / len(other)
    chance = float(first @ second)
    return float("nan") if chance == 1 else (float((one == other).mean()) - chance) / (1 - chance)


def krippendorff_alpha(votes: Labels) -> float:
    """Nominal alpha of raters [rows, raters], with missing votes (Krippendorff, 2011: Computing alpha-reliability).

    Rows with fewer than two votes are not pairable and do not count. NaN where all votes are one label.
    """
    votes = votes[(votes != MISSING).sum(1) >= 2]
    if not votes.size:
        return float("nan")
    size = int(votes.max()) + 1
    counts = np.stack([(votes == label).sum(1) for label in range(size)], axis=1).astype(float)  # [rows, labels]
    per_row = counts.sum(1)
    # coincidences on the diagonal: pairs of equal votes, each row weighing 1 / (votes - 1)
    equal = ((counts * (counts - 1)).sum(1) / (per_row - 1)).sum()
    totals = counts.sum(0)
    n = totals.sum()
    expected = (totals * (totals - 1)).sum()
    if expected == n * (n - 1):
        return float("nan")
    observed_disagreement = (n - equal) / n
    expected_disagreement = 1 - expected / (n * (n - 1))
    return float(1 - observed_disagreement / expected_disagreement)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins of equal width.

    Guo et al., 2017: On calibration of modern neural networks. ``confidence`` and ``right`` are [n].
    """
    if not len(confidence):
        return float("nan")
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[which == b].mean() - right[which == b].mean()) * (which == b).sum() for b in np.unique(which)
    ]
    return float(sum(gaps) / len(confidence))


@dataclass(frozen=True)
class Agreement:
    """Labels against gold labels; ``rows`` have a gold label, ``covered`` is the share of them that got a label."""

    rows: int
    covered: float
    accuracy: float
    macro_f1: float
    kappa: float
    calibration_error: float

    @classmethod
    def measure(cls, found: Labels, gold: Labels, confidence: NDArray[np.float64]) -> Agreement:
        """``confidence`` [n] is the probability of the label found, NaN where there is none."""
        known = gold != MISSING
        if not known.any():
            nan = float("nan")
            return cls(0, nan, nan, nan, nan, nan)
        usable = known & (found != MISSING) & ~np.isnan(confidence)
        error = calibration_error(confidence[usable], found[usable] == gold[usable])
        return cls(
            int(known.sum()), float((found[known] != MISSING).mean()), accuracy(found, gold), macro_f1(found, gold),
            cohen_kappa(found, gold), error,
        )  # fmt: skip
