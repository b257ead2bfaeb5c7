"""Scores: the tree of labels gives what every label alone gives; calibration takes a bias away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit.errors import DataError
from llmkit.inference.generate import open_generator
from llmkit.labelling.calibrate import bias_of, normalised, probabilities
from llmkit.labelling.models import drawn
from llmkit.labelling.scorer import TreeScorer
from llmkit.labelling.tree import LabelTree

LABELS = [[5, 6, 7, 2], [5, 6, 2], [5, 9, 2], [8, 2], [10, 11, 12, 13, 2]]
PROMPTS = [list(range(20, 40)) + [n, n + 1, n + 2][: n % 3 + 1] for n in range(50, 57)]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen"])
@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_the_tree_scores_as_each_label_alone_does(
    model: str, batch_tokens: int, request: pytest.FixtureRequest
) -> None:
    bare = open_generator(request.getfixturevalue(model), device="cpu", dtype="float32").bare
    scorer = TreeScorer(bare, LABELS, batch_tokens=batch_tokens)
    found = scorer.tree.sums(scorer.nodes(PROMPTS))
    assert not scorer.notes
    for row, prompt in enumerate(PROMPTS):
        for column, label in enumerate(LABELS):
            with torch.inference_mode():
                logs = bare(input_ids=torch.tensor([[*prompt, *label]])).logits[0].float().log_softmax(-1)
            alone = sum(float(logs[len(prompt) - 1 + n, token]) for n, token in enumerate(label))
            assert found[row, column] == pytest.approx(alone, abs=2e-4)


def test_a_model_that_ignores_the_mask_is_scored_label_by_label(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = open_generator(tiny_llama, device="cpu", dtype="float32").bare
    right = TreeScorer(bare, LABELS).nodes(PROMPTS)
    monkeypatch.setattr(TreeScorer, "_mask", lambda *_: None)
    scorer = TreeScorer(bare, LABELS)
    assert np.allclose(scorer.nodes(PROMPTS), right, atol=2e-4)
    assert scorer.notes


def test_prompts_without_room_are_refused(tiny_llama: Path) -> None:
    scorer = TreeScorer(open_generator(tiny_llama, device="cpu").bare, LABELS)
    limit = int(scorer.model.config.max_position_embeddings)
    with pytest.raises(DataError, match="room"):
        scorer.check([5] * limit)
    scorer.check([5] * (limit - 5))


def test_a_walk_with_a_constraint_is_a_distribution_over_the_labels() -> None:
    tree = LabelTree.of(LABELS)
    logs = np.log(np.random.default_rng(0).random((4, len(tree.tokens))))
    assert np.exp(tree.walked(logs)).sum(1) == pytest.approx(np.ones(4))
    assert np.exp(tree.walked(logs, 0.5)).sum(1) == pytest.approx(np.ones(4))
    cold = tree.walked(logs, 1e-3).argmax(1)
    assert tree.greedy(logs).tolist() == cold.tolist()
    draws = drawn(tree.walked(logs), 4000, [1, 2, 3, 4])
    shares = np.stack([np.bincount(row, minlength=5) / 4000 for row in draws])
    assert np.abs(shares - np.exp(tree.walked(logs))).max() < 0.03


@pytest.mark.parametrize(
    ("labels", "why"), [([[1], [1, 2]], "beginning"), ([[1, 2], [1, 2]], "same"), ([[], [1]], "no tokens")]
)
def test_labels_that_are_no_choice_are_refused(labels: list[list[int]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        LabelTree.of(labels)


def test_a_bias_for_one_label_is_taken_away() -> None:
    random = np.random.default_rng(1)
    honest = random.normal(size=(500, 3))
    biased = honest + np.array([5.0, 0, -2])
    right = honest.argmax(1)
    before = (probabilities(biased).argmax(1) == right).mean()
    assert (probabilities(biased, bias_of(biased)).argmax(1) == right).mean() > before + 0.25
    neutral = np.array([[5.0, 0, -2]])
    assert probabilities(biased, bias_of(neutral)) == pytest.approx(probabilities(honest))
    assert normalised(np.array([[-6.0, -6.0]]), np.array([2, 3]), "mean").tolist() == [[-3, -2]]
