"""One label from several voters: majority, weighted majority, mean of probabilities, or a label model (Dawid–Skene).

Votes are [rows, voters], whole numbers from 0, -1 where a voter gave none. Every rule gives probabilities [rows, labels];
a row without a vote has NaN. Ties are never broken in secret: ``choose`` says which rows have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.labelling.agreement import MISSING, Labels

Probabilities = NDArray[np.float64]
TIE = 1e-9


def counted(votes: Labels, labels: int, weights: NDArray[Any] | None = None) -> Probabilities:
    """Each label's share of the votes, every voter counting its weight (1 without ``weights`` [voters])."""
    weight = np.ones(votes.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = np.stack([((votes == label) * weight).sum(1) for label in range(labels)], axis=1)
    return _normalised(shares)


def averaged(probabilities: NDArray[Any], weights: NDArray[Any] | None = None) -> Probabilities:
    """Mean of the voters' probabilities [rows, voters, labels], leaving out voters with NaN."""
    weight: NDArray[np.float64] = (
        np.ones(probabilities.shape[:2]) if weights is None else np.asarray(weights, float)[None]
    )
    weight = np.where(np.isnan(probabilities).any(axis=-1), 0.0, weight)
    total: NDArray[np.float64] = (np.nan_to_num(probabilities) * weight[:, :, None]).sum(axis=1)
    return _normalised(total)


def choose(probabilities: Probabilities) -> tuple[Labels, NDArray[np.bool_]]:
    """The likeliest label [rows] (-1 without votes; of a tie the first in the order of labels), and which rows tie."""
    empty = np.asarray(np.isnan(probabilities).any(axis=1))
    filled = np.where(empty[:, None], 0.0, probabilities)
    best = filled.argmax(1)
    top = filled.max(1)
    tied = np.sum(top[:, None] - filled < TIE, axis=1) > 1
    best[empty] = MISSING
    return best.astype(np.int64), tied & ~empty


@dataclass(frozen=True)
class LabelModel:
    """What Dawid–Skene found: ``confusion`` [voters, labels, labels] is P(vote | truth), rows are the truth."""

    probabilities: Probabilities
    confusion: NDArray[np.float64]
    prior: NDArray[np.float64]
    rounds: int
    converged: bool


def dawid_skene(
    votes: Labels, labels: int, *, rounds: int = 200, tolerance: float = 1e-6, smoothing: float = 0.01
) -> LabelModel:
    """Every voter's confusion matrix and every row's label, found together by EM without gold labels.

    Dawid and Skene, 1979: Maximum likelihood estimation of observer error-rates using the EM algorithm. It begins with
    the shares of the votes. ``smoothing`` is added to every count of a confusion matrix, so that a vote that was never
    seen with a label does not rule it out. It ends when no probability moves by more than ``tolerance``.
    """
    posterior = counted(votes, labels)
    voted = ~np.isnan(posterior).any(1)
    cast = votes[voted]
    belief = posterior[voted]
    one_hot = [(cast[:, [voter]] == np.arange(labels)).astype(np.float64) for voter in range(cast.shape[1])]
    confusion = np.full((cast.shape[1], labels, labels), np.nan)
    prior = np.full(labels, 1 / labels)
    converged, done = False, 0
    while done < rounds and not converged:
        done += 1
        prior = (belief.sum(0) + smoothing) / (belief.sum() + labels * smoothing)
        for voter, chosen in enumerate(one_hot):
            counts = belief.T @ chosen + smoothing
            confusion[voter] = counts / counts.sum(1, keepdims=True)
        logs = np.log(prior) + sum(chosen @ np.log(confusion[voter]).T for voter, chosen in enumerate(one_hot))
        after = np.exp(logs - logs.max(1, keepdims=True))
        after /= after.sum(1, keepdims=True)
        converged = float(np.abs(after - belief).max(initial=0.0)) < tolerance
        belief = after
    posterior[voted] = belief
    return LabelModel(posterior, confusion, prior, done, converged)


def _normalised(shares: Probabilities) -> Probabilities:
    total = shares.sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, shares / np.where(total > 0, total, 1), np.nan)
