"""Vectors of texts that come again and again, in small calls: each text is embedded once."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.inference.embedding.embedder import Embedder
from llmkit.inference.embedding.settings import EmbeddingSettings


class TextVectors:
    """Texts [n] to vectors [n][d] of length 1, so that a dot product is a cosine. A text is embedded once.

    Texts longer than the model takes are cut; ``cut`` counts them. Raises as ``Embedder`` does.
    """

    def __init__(self, name_or_path: str) -> None:
        self._embedder = Embedder(name_or_path, EmbeddingSettings(normalize=True, on_too_long="truncate"))
        self._known: dict[str, list[float]] = {}

    @property
    def cut(self) -> int:
        return self._embedder.tokens.truncated

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        # an empty text has no token in some models; a space is the nearest to it that has one
        if new:
            made = self._embedder([text or " " for text in new])
            self._known |= {text: vector.tolist() for text, vector in zip(new, made, strict=True)}
        return [self._known[text] for text in texts]
