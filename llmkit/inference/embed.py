"""Embeddings of texts with an encoder model of transformers: the mean over a text's tokens, of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.errors import UsageError
from llmkit.modeling.locate import find_folder

BATCH = 32
LONGEST = 512


class Embedder:
    """Texts [n] to vectors [n][d] of length 1, so that a dot product is a cosine. A text is embedded once.

    The vector is the mean of the last hidden states over the tokens of the text (Reimers and Gurevych, 2019:
    Sentence-BERT); padding does not count, so that alone and in a batch a text has the same vector. Raises MissingError where
    there is no such model, UsageError where it has no hidden states.
    """

    def __init__(self, name_or_path: str, *, device: str | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = str(find_folder(name_or_path))
        try:
            model = AutoModel.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError, KeyError) as error:
            raise UsageError(f"{name_or_path} cannot be loaded for embeddings: {str(error).splitlines()[0]}") from error
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        self._tokenizer = tokenizer
        self._known: dict[str, list[float]] = {}
        limit = getattr(model.config, "max_position_embeddings", None) or LONGEST
        self._longest = min(int(limit), LONGEST)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        new = sorted({text for text in texts if text not in self._known}, key=len)
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            self._known |= dict(zip(part, self._embed(part), strict=True))
        return [self._known[text] for text in texts]

    def _embed(self, texts: list[str]) -> list[list[float]]:
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt", padding_side="right"
        ).to(self._device)
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=-1).tolist()
        return vectors
