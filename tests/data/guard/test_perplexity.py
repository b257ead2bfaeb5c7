"""Perplexities of a real (tiny) model, against its own loss; the cut, and the rows that it names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.data.guard.perplexity import cut, histogram, score
from llmkit.data.guard.settings import PerplexitySettings
from llmkit.errors import MissingError

OFF = dict.fromkeys(("privacy", "duplicates", "leaks", "contradictions", "quality"))


def test_scores_are_the_models_own_loss_whatever_lies_beside(tiny_llama: Path, progress: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["The quick brown fox", "a", "jumps over the lazy dog and over " * 40, "", "한국어 문장도 있습니다."]
    settings = PerplexitySettings(model=str(tiny_llama), max=10.0, max_length=64)
    found = score(iter(texts), len(texts), settings, progress)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama).eval(),
        AutoTokenizer.from_pretrained(tiny_llama),
    )
    for text, perplexity in zip(texts, found.tolist(), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]], dtype=torch.long)
        if ids.shape[1] < 2:
            assert math.isnan(perplexity)
            continue
        with torch.inference_mode():
            assert perplexity == pytest.approx(math.exp(model(input_ids=ids, labels=ids).loss.item()), rel=1e-4)


def test_the_cut_is_a_percentile_or_a_number(tmp_path: Path) -> None:
    scores = np.array([*range(1, 101), np.nan], np.float32)
    assert cut(scores, PerplexitySettings(model="x", drop_above_percentile=90.0)) == pytest.approx(90.1)
    assert cut(scores, PerplexitySettings(model="x", max=42.0)) == 42.0
    assert cut(np.array([np.nan], np.float32), PerplexitySettings(model="x", drop_above_percentile=90.0)) == math.inf
    histogram(tmp_path / "p.png", scores, 90.1, "models/small")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_rows_above_the_cut_are_dropped_and_the_histogram_drawn(
    check: Any, words: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    guard = OFF | {"quality": {"action": "drop", "checks": [], "perplexity": {"model": str(tiny_llama)}}}
    guard["quality"]["perplexity"]["drop_above_percentile"] = 80
    verdict = check(words.rows(50), guard=guard)
    assert verdict.train[0].dropped.sum() == 10
    assert verdict.report["quality"]["perplexity"]["rows"] == 10
    assert verdict.report["quality"]["perplexity"]["cut"] > 1
    assert (tmp_path / "out" / "perplexity.png").is_file()
    again = check(words.rows(50), guard=guard)
    assert again.train[0].dropped.sum() == 10


def test_a_model_that_is_not_there(progress: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        score(iter(["a b"]), 1, PerplexitySettings(model=str(tmp_path / "none"), max=9.0), progress)
