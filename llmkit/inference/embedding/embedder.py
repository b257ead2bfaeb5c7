"""Texts in, vectors out: an embedding model with its tokenizer, from Python and under ``llmkit embed``.

::

    from llmkit.inference.embedding.embedder import Embedder

    embed = Embedder("models/all-MiniLM-L6-v2")
    vectors = embed(["a text", "another"])      # float32 [2, 384], of unit length as the folder says
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llmkit.errors import DataError, UsageError
from llmkit.inference.embedding.backbone import cut_above, open_backbone
from llmkit.inference.embedding.batches import Ids
from llmkit.inference.embedding.encoder import Encoder
from llmkit.inference.embedding.folder import EmbeddingFolder, read_folder
from llmkit.inference.embedding.heads import heads
from llmkit.inference.embedding.settings import EmbeddingModelSettings, EmbeddingSettings
from llmkit.inference.embedding.tokens import Refused, Tokens
from llmkit.inference.embedding.vectors import Vectors, finish


class Embedder:
    """An embedding model. The weights are read when the first vector is asked for, the tokenizer at once.

    Raises MissingError or UsageError for a model, prompt or length that cannot be used.
    """

    def __init__(
        self,
        model: str | EmbeddingModelSettings,
        settings: EmbeddingSettings | None = None,
        *,
        folder: EmbeddingFolder | None = None,
    ) -> None:
        self.model_settings = EmbeddingModelSettings(name_or_path=model) if isinstance(model, str) else model
        self.settings = settings or EmbeddingSettings()
        named = self.model_settings
        self.folder = folder or read_folder(named.name_or_path, named.revision)
        if self.folder.kind == "clip":
            raise UsageError(f"{named.name_or_path} has a tower for texts and one for images: use PairEmbedder")
        self.tokens = Tokens(self.folder, self.settings, trust_remote_code=named.trust_remote_code)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors ``[rows, dim]``, float32. Raises DataError for a text that has none: empty, or too long."""
        found = self.tokens(texts)
        refused = [(row, one.reason) for row, one in enumerate(found) if isinstance(one, Refused)]
        if refused:
            first = "; ".join(f"text {row}: {reason}" for row, reason in refused[:3])
            raise DataError(f"{len(refused)} of {len(texts)} texts cannot be embedded: {first}")
        return self.vectors([ids for ids in found if isinstance(ids, np.ndarray)])

    def vectors(self, sequences: Sequence[Ids]) -> Vectors:
        """Vectors ``[rows, dim]``, float32, of what ``tokens`` made of the texts."""
        settings = self.settings
        return finish(self.encoder.encode(sequences), settings.truncate_dim, self.normalize)

    @cached_property
    def encoder(self) -> Encoder:
        named = self.model_settings
        device = device_of(named)
        model = open_backbone(self.folder, dtype_of(named, device), trust_remote_code=named.trust_remote_code)
        model = cut_above(model, self.settings.layer).to(device)  # type: ignore[arg-type]  # a stub of transformers' own
        modes = self._modes(model.config)
        skip = 0 if self.folder.include_prompt else self.tokens.prompt_tokens
        made = Encoder(
            model, modes, heads(self.folder.modules), skip=skip, batch_tokens=self.settings.batch_tokens,
            share_prefix=_is_causal(model),
        )  # fmt: skip
        if self.settings.truncate_dim is not None and self.settings.truncate_dim > self._width(made):
            raise UsageError(f"embedding.truncate_dim: the vectors have {self._width(made):,} dimensions")
        return made

    @property
    def normalize(self) -> bool:
        if self.settings.normalize is not None:
            return self.settings.normalize
        plain = self.folder.pooling is None
        return plain or any(module.kind == "normalize" for module in self.folder.modules)

    @cached_property
    def dim(self) -> int:
        """Dimensions of a vector, before it is packed."""
        return self.settings.truncate_dim or self._width(self.encoder)

    def identity(self) -> dict[str, Any]:
        """What decides the vectors, beside the texts: for a manifest, and to refuse a resume that would mix two kinds."""
        named = self.model_settings
        device = device_of(named)
        return {
            "model": named.name_or_path, "revision": named.revision, "digest": self.folder.digest(),
            "dtype": str(dtype_of(named, device)).removeprefix("torch."), "device": device.split(":")[0],
            "prompt": self.tokens.prompt, "pooling": self._pooling_name(), "layer": self.settings.layer,
            "normalize": self.normalize, "truncate_dim": self.settings.truncate_dim,
            "precision": self.settings.precision, "max_length": self.tokens.max_length,
            "on_too_long": self.settings.on_too_long,
        }  # fmt: skip

    def _modes(self, config: Any) -> tuple[str, ...]:
        if self.settings.pooling != "auto":
            return (self.settings.pooling,)
        return self.folder.pooling or (("last",) if _decodes(config) else ("mean",))

    def _pooling_name(self) -> str:
        from transformers import AutoConfig

        if self.settings.pooling == "auto" and self.folder.pooling is None and not self.folder.is_adapter:
            config = AutoConfig.from_pretrained(
                str(self.folder.weights), trust_remote_code=self.model_settings.trust_remote_code
            )
            return "+".join(self._modes(config))
        return self.settings.pooling if self.folder.pooling is None else "+".join(self._modes(None))

    def _width(self, encoder: Encoder) -> int:
        ids = np.array([self.tokens.any_token], dtype=np.int32)
        width = int(encoder.encode([ids]).shape[1])
        encoder.tokens = 0
        return width


def device_of(named: EmbeddingModelSettings) -> str:
    """The device that is asked for, else a GPU where there is one. Raises UsageError for one that is not there."""
    device = named.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"model.device: {device} is not there: {str(error).splitlines()[0]}") from error
    return device


def dtype_of(named: EmbeddingModelSettings, device: str) -> torch.dtype:
    """The type of the computation; ``auto`` takes bfloat16 only where the hardware multiplies it."""
    if named.dtype != "auto":
        found: torch.dtype = getattr(torch, named.dtype)
        return found
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    can = torch.cpu.get_capabilities() if device == "cpu" else {}
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32


def _decodes(config: Any) -> bool:
    """Does a model of this configuration write text, token by token, and nothing else?"""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    writes = type(config) in AutoModelForCausalLM._model_mapping and not config.is_encoder_decoder
    fills_gaps = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    return writes and not fills_gaps and not getattr(config, "use_bidirectional_attention", False)


def _is_causal(model: torch.nn.Module) -> bool:
    """Does no token see those behind it? Asked of the attention layers; the encoder's probe checks what follows from it."""
    marks = [getattr(module, "is_causal", None) for module in model.modules()]
    return any(mark is True for mark in marks) and not any(mark is False for mark in marks)
