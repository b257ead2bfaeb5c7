"""The same vectors by another library: ``llmkit embed RECIPE --check-against sentence-transformers``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.inference.embedding.embedder import Embedder
from llmkit.inference.embedding.settings import EmbeddingModelSettings, EmbeddingSettings
from llmkit.inference.embedding.vectors import finish

ROWS = 200
LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999, "float16": 0.9999}
_POOLING = {
    "last": "lasttoken", "weighted_mean": "weightedmean", "mean_sqrt_len": "mean_sqrt_len_tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Cosines between both sides' vectors of the same texts; ``worst`` is the text at ``row`` of those compared."""

    rows: int
    worst: float
    mean: float
    row: int
    text: str
    least: float

    @property
    def same(self) -> bool:
        return self.worst >= self.least

    def __str__(self) -> str:
        shown = " ".join(self.text.split())[:80]
        return (
            f"{self.rows:,} texts: worst cosine {self.worst:.7f} (row {self.row}: {shown!r}), mean {self.mean:.7f}; "
            f"at least {self.least} is asked for: {'the same' if self.same else 'NOT the same'}"
        )


def compare(
    model: EmbeddingModelSettings, settings: EmbeddingSettings, texts: Sequence[str], against: str
) -> Comparison:
    """Embed ``texts`` by llmkit and by ``against``, each text longer than the model takes left out of both.

    Raises UsageError for another library, or settings that it does not know; MissingError where it is not installed,
    DataError where there is nothing to compare.
    """
    if against != "sentence-transformers":
        raise UsageError(f"--check-against {against}: llmkit can compare with sentence-transformers")
    if settings.image is not None or settings.layer is not None:
        raise UsageError(
            "--check-against compares texts at the last layer: leave embedding.image and embedding.layer out"
        )
    ours = Embedder(model, settings)
    found = ours.tokens(texts)
    kept = [row for row, ids in enumerate(found) if isinstance(ids, np.ndarray)]
    if not kept:
        raise DataError("--check-against: none of the texts can be embedded")
    ids = [one for one in found if isinstance(one, np.ndarray)]
    chosen = [texts[row] for row in kept]
    a = ours.vectors(ids).astype(np.float64)
    b = _theirs(ours, chosen).astype(np.float64)
    cosines = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    worst = int(cosines.argmin())
    dtype = str(ours.identity()["dtype"])
    return Comparison(
        len(kept), float(cosines[worst]), float(cosines.mean()), kept[worst], chosen[worst], LEAST_COSINE[dtype]
    )


def _theirs(ours: Embedder, texts: Sequence[str]) -> np.ndarray:
    """sentence-transformers' vectors, in float32; a chat template is not applied, as llmkit embeds texts as they are."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError:
        raise MissingError.extra("sentence-transformers", "bench") from None
    import torch

    folder, settings = ours.folder, ours.settings
    if folder.is_adapter:
        raise UsageError("--check-against: merge the adapter first (llmkit merge)")
    if (folder.root / "modules.json").is_file() and settings.pooling == "auto":
        model = SentenceTransformer(str(folder.root), device="cpu")
    else:
        first = Transformer(str(folder.weights))
        mode = str(ours.identity()["pooling"])
        modules = [first, Pooling(first.get_embedding_dimension(), _POOLING.get(mode, mode))]
        model = SentenceTransformer(modules=modules, device="cpu")
    tokenizer = model.tokenizer
    if getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "--check-against: the model has a chat template, which sentence-transformers puts around every text; "
            "compare on a copy of the folder without it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.max_seq_length = ours.tokens.max_length
    with torch.inference_mode():
        made = model.float().encode(list(texts), prompt=ours.tokens.prompt or "", show_progress_bar=False)
    return finish(np.asarray(made, dtype=np.float32), settings.truncate_dim, ours.normalize)
