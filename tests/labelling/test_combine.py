"""Combining votes: ties are told, weights count, a label model finds out who is right without gold labels."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.labelling.combine import averaged, choose, counted, dawid_skene
from llmkit.labelling.decide import DISAGREED, NO_VOTE, TIE, UNSURE, decide, decide_text, same_json, same_text
from llmkit.labelling.settings import AbstainSettings

CONFUSION = np.array([
    [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.05, 0.05, 0.9]],
    [[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]],
    [[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]],
    [[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]],  # takes the first two labels for each other
])  # fmt: skip
PRIOR = np.array([0.5, 0.3, 0.2])


def simulated(rows: int, missing: float = 0.2, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = random.choice(3, size=rows, p=PRIOR)
    votes = np.array([[random.choice(3, p=voter[t]) for voter in CONFUSION] for t in truth])
    votes[random.random(votes.shape) < missing] = -1
    return truth, votes


def test_dawid_skene_finds_the_confusion_matrices_that_made_the_votes() -> None:
    truth, votes = simulated(6000)
    found = dawid_skene(votes, 3, rounds=2000)
    assert found.converged
    assert np.abs(found.confusion - CONFUSION).max() < 0.06
    assert np.abs(found.prior - PRIOR).max() < 0.04
    assert np.allclose(found.confusion.sum(2), 1)
    label = choose(found.probabilities)[0]
    majority = choose(counted(votes, 3))[0]
    there = label >= 0
    assert (label[there] == truth[there]).mean() > (majority[there] == truth[there]).mean() + 0.05


def test_a_row_without_votes_has_no_label_under_any_rule() -> None:
    votes = np.array([[0, 1], [-1, -1], [1, 1]])
    for found in (counted(votes, 2), dawid_skene(votes, 2).probabilities):
        assert np.isnan(found[1]).all()
        assert choose(found)[0][1] == -1


def test_ties_are_told_and_weights_break_them() -> None:
    votes = np.array([[0, 1], [1, 1]])
    label, tied = choose(counted(votes, 2))
    assert tied.tolist() == [True, False]
    assert label.tolist() == [0, 1]
    label, tied = choose(counted(votes, 2, np.array([1.0, 2.0])))
    assert label.tolist() == [1, 1]
    assert not tied.any()


def test_the_mean_leaves_out_voters_without_probabilities() -> None:
    shares = np.array([[[0.2, 0.8], [np.nan, np.nan]], [[0.2, 0.8], [0.9, 0.1]]])
    assert averaged(shares) == pytest.approx(np.array([[0.2, 0.8], [0.55, 0.45]]))


def test_every_reason_to_abstain() -> None:
    votes = np.array([[0, 0, 0], [0, 1, -1], [0, 0, 1], [-1, -1, -1]])
    made = decide(votes, counted(votes, 2), AbstainSettings(agreement=0.9))
    assert made.reasons == ["", TIE, DISAGREED, NO_VOTE]
    assert made.label.tolist() == [0, -1, -1, -1]
    assert made.best.tolist() == [0, 0, 0, -1]
    made = decide(votes, counted(votes, 2), AbstainSettings(below=0.6, tie=False))
    assert made.reasons == ["", UNSURE, "", NO_VOTE]


def test_texts_that_differ_by_space_and_case_are_one_vote() -> None:
    made = decide_text(
        ["Red  shoe", "red shoe", "boot"], [0.1, 0.3, 0.9], [1, 1, 1], [same_text] * 3, AbstainSettings()
    )
    assert (made.text, made.confidence, made.agreement) == ("red shoe", 0.3, pytest.approx(2 / 3))
    made = decide_text(["a", "b"], [0.1, 0.3], [1, 1], [same_text] * 2, AbstainSettings(agreement=0.6))
    assert (made.text, made.best, made.reason) == (None, "b", DISAGREED)


def test_json_that_breaks_the_schema_is_no_vote() -> None:
    same = same_json({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})
    answers = ['{"a": 1, "b": 2}', '{"b":2,"a":1}', '{"a": "1"}', "not JSON", None]
    made = decide_text(answers, [0.5] * 5, [1] * 5, [same] * 5, AbstainSettings())
    assert (made.text, made.agreement) == ('{"a": 1, "b": 2}', pytest.approx(0.4))
    made = decide_text(["no"], [0.5], [1], [same], AbstainSettings())
    assert (made.text, made.reason) == (None, NO_VOTE)
