"""Embeddings: unit vectors, the same alone and in a batch, whatever the padding."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.errors import MissingError
from llmkit.inference.embed import Embedder


def test_a_text_has_one_vector_alone_and_in_a_batch(tiny_llama: Path) -> None:
    texts = ["무선 이어폰", "How many legs has a spider? " * 20, "a", "무선 이어폰"]
    together = Embedder(str(tiny_llama), device="cpu")(texts)
    assert together[0] == together[3]
    for text, vector in zip(texts, together, strict=True):
        assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-5)
        assert Embedder(str(tiny_llama), device="cpu")([text])[0] == pytest.approx(vector, abs=1e-5)


def test_the_mean_is_over_the_tokens_of_the_text(tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), AutoModel.from_pretrained(tiny_llama).eval()
    with torch.inference_mode():
        mean = model(**tokenizer("gift card", return_tensors="pt")).last_hidden_state[0].mean(0)
    expected = torch.nn.functional.normalize(mean, dim=0).tolist()
    (found,) = Embedder(str(tiny_llama), device="cpu")(["gift card"])
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(MissingError, match="no folder no/such/embedder/model"):
        Embedder("no/such/embedder/model")
