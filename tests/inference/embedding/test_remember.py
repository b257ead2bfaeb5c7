"""Vectors for prompt tests: of length 1, a text embedded once, a long one cut and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.inference.embedding.remember import TextVectors


def test_a_text_is_embedded_once_and_a_long_one_cut(tiny_llama: Path) -> None:
    embed = TextVectors(str(tiny_llama))
    first = embed(["무선 이어폰", "", "무선 이어폰"])
    assert first[0] == first[2] != first[1]
    assert sum(value * value for value in first[0]) == pytest.approx(1.0, abs=1e-5)
    tokens = embed._embedder.encoder.tokens
    assert embed(["무선 이어폰"]) == [first[0]]
    assert embed._embedder.encoder.tokens == tokens
    assert embed.cut == 0
    embed(["the card " * 600])
    assert embed.cut == 1
