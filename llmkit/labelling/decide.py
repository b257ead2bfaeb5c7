"""From the votes of a row to its label or answer, its confidence and agreement, or the reason why it has none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.labelling.agreement import MISSING, Labels
from llmkit.labelling.combine import Probabilities, averaged, choose, counted
from llmkit.labelling.settings import AbstainSettings, CombineSettings

NO_VOTE, TIE, UNSURE, DISAGREED = (
    "no usable answer",
    "tie",
    "confidence below the threshold",
    "agreement below the threshold",
)


@dataclass(frozen=True)
class Decided:
    """Of n rows: ``label`` [n] (-1: abstained), ``best`` [n] what it would have been, ``confidence`` and ``agreement``
    [n], ``probabilities`` [n, labels], ``reasons`` [n], empty where there is a label."""

    label: Labels
    best: Labels
    confidence: NDArray[np.float64]
    agreement: NDArray[np.float64]
    probabilities: Probabilities
    reasons: Sequence[str]


def combined(votes: Labels, shares: NDArray[Any], rule: CombineSettings, weights: NDArray[np.float64]) -> Probabilities:
    """Probabilities [rows, labels] by the recipe's rule, but for a label model.

    ``votes`` are [rows, voters × samples], ``shares`` the voters' probabilities [rows, voters, labels], ``weights``
    [voters]. A lone vote with probabilities keeps them.
    """
    voters, labels = shares.shape[1:]
    samples = votes.shape[1] // voters
    if rule.rule == "mean":
        return averaged(shares, weights)
    if votes.shape[1] == 1 and not np.isnan(shares).any():
        return shares[:, 0].astype(np.float64)
    return counted(votes, labels, np.repeat(weights, samples) if rule.rule == "weighted" else None)


def decide(votes: Labels, probabilities: Probabilities, rule: AbstainSettings) -> Decided:
    """Labels, and which rows abstain. ``votes`` [rows, votes] give the agreement."""
    best, tied = choose(probabilities)
    sure = np.where(best == MISSING, np.nan, np.take_along_axis(probabilities, np.maximum(best, 0)[:, None], 1)[:, 0])
    agreement = np.where(best == MISSING, np.nan, (votes == best[:, None]).mean(1))
    reasons = []
    for row in range(len(best)):
        if best[row] == MISSING:
            reasons.append(NO_VOTE)
        elif rule.tie and tied[row]:
            reasons.append(TIE)
        elif sure[row] < rule.below:
            reasons.append(UNSURE)
        else:
            reasons.append(DISAGREED if agreement[row] < rule.agreement else "")
    kept = np.array([not reason for reason in reasons], dtype=bool)
    return Decided(np.where(kept, best, MISSING), best, sure, agreement, probabilities, reasons)


@dataclass(frozen=True)
class Answer:
    """What a row's answers came to: ``text`` is None for a row that abstains, ``best`` what it would have been."""

    text: str | None
    best: str | None
    confidence: float
    agreement: float
    reason: str


def decide_text(
    answers: Sequence[str | None],
    confidences: Sequence[float],
    weights: Sequence[float],
    usable: Sequence[Callable[[str], str | None]],
    rule: AbstainSettings,
) -> Answer:
    """The answer of one row with the most votes; of equally many votes the surest, else the first.

    ``usable`` gives for each vote what makes two answers the same, None for an answer that breaks the schema.
    """
    groups: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        same = usable[index](answer) if answer else None
        if same is not None:
            groups.setdefault(same, []).append(index)
    if not groups:
        return Answer(None, None, float("nan"), 0.0, NO_VOTE)

    def rank(group: list[int]) -> tuple[float, float, int]:
        return sum(weights[i] for i in group), max(np.nan_to_num(confidences[i], nan=0.0) for i in group), -group[0]

    group = max(groups.values(), key=rank)
    surest = max(group, key=lambda i: (np.nan_to_num(confidences[i], nan=0.0), -i))
    best, sure, agreement = answers[surest], float(confidences[surest]), len(group) / len(answers)
    reason = UNSURE if sure < rule.below else DISAGREED if agreement < rule.agreement else ""
    return Answer(None if reason else best, best, sure, agreement, reason)


def same_text(answer: str) -> str | None:
    """Texts are the same but for white space and letter case."""
    return " ".join(answer.split()).casefold() or None


def same_json(schema: Mapping[str, Any]) -> Callable[[str], str | None]:
    """For answers that have to be JSON by ``schema``: their one written form, or None for one that is not."""
    import jsonschema

    validator = jsonschema.validators.validator_for(schema)(dict(schema))

    def same(answer: str) -> str | None:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return None
        return json.dumps(value, sort_keys=True, ensure_ascii=False) if validator.is_valid(value) else None

    return same
