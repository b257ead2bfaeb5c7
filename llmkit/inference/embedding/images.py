"""Images and texts in one space of vectors: two-tower models (CLIP, SigLIP) and vision-language models.

Both go through the model's own processor in transformers, with its PIL backend, so that torchvision is not needed.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.inference.embedding.backbone import load_weights
from llmkit.inference.embedding.batches import cut
from llmkit.inference.embedding.embedder import device_of, dtype_of
from llmkit.inference.embedding.folder import EmbeddingFolder, read_folder
from llmkit.inference.embedding.pooling import pool
from llmkit.inference.embedding.settings import EmbeddingModelSettings, EmbeddingSettings
from llmkit.inference.embedding.tokens import Refused, Tokens
from llmkit.inference.embedding.vectors import Vectors, finish
from llmkit.modeling.load import quiet

Inputs = dict[str, np.ndarray]
"""What the processor made of one row: arrays whose first dimension is that of a batch."""

IMAGES_AT_ONCE = 8
TEXT_TOKENS_AT_ONCE = 4096


def read_image(value: Any, root: str | None = None) -> Any:
    """The picture behind a path, a file's bytes, or a mapping with one of them (as in Hugging Face's Parquet), in RGB.

    Raises DataError where it is missing or damaged, MissingError without Pillow.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingError.extra("pillow", "image") from None
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        path = Path(root or "", value)
        if not path.is_file():
            raise DataError(f"there is no image {path}")
        value = path.read_bytes()
    if not isinstance(value, bytes):
        raise DataError(f"expected the path or the bytes of an image, got {type(value).__name__}")
    try:
        return Image.open(io.BytesIO(value)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be read: {str(error).splitlines()[0][:120]}") from None


def image_key(value: Any) -> bytes:
    """Equal for equal images: of a path or of the bytes."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) and len(value) <= 32 else hashlib.sha256(
        value if isinstance(value, bytes) else str(value).encode()
    ).digest()  # fmt: skip


class _Multimodal(ABC):
    """What the two kinds have in common: rows (text, image) to inputs ahead of the model, inputs to vectors."""

    def __init__(
        self, model: str | EmbeddingModelSettings, settings: EmbeddingSettings, folder: EmbeddingFolder | None = None
    ) -> None:
        self.model_settings = EmbeddingModelSettings(name_or_path=model) if isinstance(model, str) else model
        self.settings = settings
        self.folder = folder or read_folder(self.model_settings.name_or_path, self.model_settings.revision)
        if self.folder.is_adapter:
            raise UsageError("An adapter of a model for images has to be merged first: llmkit merge")
        if settings.layer is not None:
            raise UsageError("embedding.layer: a model for images is taken whole; remove the line")
        self.tokens = Tokens(self.folder, settings, trust_remote_code=self.model_settings.trust_remote_code)
        self.passed = 0
        """Tokens that went through the model."""

    def __call__(self, texts: Sequence[Any] = (), images: Sequence[Any] = ()) -> Vectors:
        """Vectors ``[rows, dim]`` of texts, images, or both row by row. Raises DataError for a row that has none."""
        rows = max(len(texts), len(images))
        found = self.prepare(list(texts) or [None] * rows, list(images) or [None] * rows)
        refused = [(row, one.reason) for row, one in enumerate(found) if isinstance(one, Refused)]
        if refused:
            raise DataError(f"{len(refused)} of {rows} rows cannot be embedded: row {refused[0][0]}: {refused[0][1]}")
        return self.vectors([one for one in found if isinstance(one, dict)])

    def prepare(self, texts: Sequence[Any], images: Sequence[Any]) -> list[Inputs | Refused]:
        found: list[Inputs | Refused] = []
        for text, image in zip(texts, images, strict=True):
            try:
                picture = None if image is None else read_image(image, self.settings.image_root)
                found.append(self._prepare(text, picture))
            except DataError as error:
                found.append(Refused(str(error)))
        return found

    @torch.inference_mode()
    def vectors(self, prepared: Sequence[Inputs]) -> Vectors:
        """Vectors ``[rows, dim]``, float32. Rows whose inputs have the same shapes go through the model together."""
        kinds: dict[Any, list[int]] = {}
        for row, inputs in enumerate(prepared):
            kinds.setdefault(tuple((name, x.shape) for name, x in sorted(inputs.items())), []).append(row)
        found: list[Any] = [None] * len(prepared)
        for rows in kinds.values():
            text_only = "pixel_values" not in prepared[rows[0]]
            at_once = TEXT_TOKENS_AT_ONCE if text_only else IMAGES_AT_ONCE
            sizes = [prepared[row]["input_ids"].shape[1] if text_only else 1 for row in rows]
            for batch in cut(sizes, at_once):
                chosen = [rows[i] for i in batch]
                merged = {name: np.concatenate([prepared[r][name] for r in chosen]) for name in prepared[rows[0]]}
                for row, vector in zip(chosen, self._forward(self._on_device(merged)), strict=True):
                    found[row] = vector.float().cpu().numpy()
        stacked = np.stack(found) if found else np.zeros((0, 0), dtype=np.float32)
        dim = self.settings.truncate_dim
        if dim is not None and found and dim > stacked.shape[1]:
            raise UsageError(f"embedding.truncate_dim: the vectors have {stacked.shape[1]:,} dimensions")
        return finish(stacked, dim, self.normalize)

    @property
    def normalize(self) -> bool:
        return True if self.settings.normalize is None else self.settings.normalize

    @cached_property
    def model(self) -> Any:
        named = self.model_settings
        device = device_of(named)
        name = str(dtype_of(named, device)).removeprefix("torch.")
        model: Any = load_weights(self.folder.weights, name, named.trust_remote_code)
        return model.eval().requires_grad_(False).to(device)

    @cached_property
    def dim(self) -> int:
        """Dimensions of a vector, before it is packed: found by embedding a text."""
        found = self.prepare(["a"], [None])[0]
        if isinstance(found, Refused):
            raise UsageError(f"{self.folder.root} cannot embed a text: {found.reason}")
        width = int(self.vectors([found]).shape[1])
        self.passed = 0
        return width

    def identity(self) -> dict[str, Any]:
        """See ``Embedder.identity``."""
        named, settings = self.model_settings, self.settings
        device = device_of(named)
        return {
            "model": named.name_or_path, "revision": named.revision, "digest": self.folder.digest(),
            "dtype": str(dtype_of(named, device)).removeprefix("torch."), "device": device.split(":")[0],
            "prompt": self.tokens.prompt, "pooling": settings.pooling, "layer": None, "normalize": self.normalize,
            "truncate_dim": settings.truncate_dim, "precision": settings.precision,
            "max_length": self.tokens.max_length, "on_too_long": settings.on_too_long,
        }  # fmt: skip

    def _on_device(self, inputs: Inputs) -> dict[str, Tensor]:
        self.passed += int(inputs["input_ids"].size) if "input_ids" in inputs else 0
        tensors = {name: torch.from_numpy(value).to(self.model.device) for name, value in inputs.items()}
        return {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in tensors.items()}

    @abstractmethod
    def _prepare(self, text: Any, picture: Any) -> Inputs | Refused: ...

    @abstractmethod
    def _forward(self, inputs: dict[str, Tensor]) -> Tensor: ...


class PairEmbedder(_Multimodal):
    """A model of two towers: an image's vector, or where a row has no image its text's, both in one space."""

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return _open(AutoImageProcessor, self.folder)

    def _prepare(self, text: Any, picture: Any) -> Inputs | Refused:
        if picture is not None:
            return {"pixel_values": np.asarray(self._processor(images=picture, return_tensors="np")["pixel_values"])}
        ids = self.tokens([text])[0]
        if isinstance(ids, Refused):
            return ids
        if (full := self._full_length) is not None:  # SigLIP was trained on texts that padding makes equally long
            ids = np.concatenate([ids, np.full(full - len(ids), self.tokens.pad_token, dtype=np.int32)])
        return {"input_ids": ids[None].astype(np.int64)}

    @cached_property
    def _full_length(self) -> int | None:
        from transformers import AutoConfig

        kind = str(AutoConfig.from_pretrained(str(self.folder.weights)).model_type)
        return self.tokens.max_length if "siglip" in kind else None

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        ask = self.model.get_image_features if "pixel_values" in inputs else self.model.get_text_features
        found = ask(**inputs)
        vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return vectors


class VisionLanguageEmbedder(_Multimodal):
    """A vision-language model: text and image of a row become one vector, by default the last token's state."""

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return _open(AutoProcessor, self.folder)

    def _prepare(self, text: Any, picture: Any) -> Inputs | Refused:
        if text is not None and not isinstance(text, str):
            return Refused(f"expected a text, got {type(text).__name__}")
        if picture is None and not text:
            return Refused("there is neither a text nor an image")
        words = self.tokens.prompt + (text or "")
        if picture is None:
            made = self._processor(text=words, return_tensors="np")
        else:
            made = self._processor(text=self._with_image(words), images=picture, return_tensors="np")
        inputs = {name: np.asarray(value) for name, value in made.items()}
        length, most = inputs["input_ids"].shape[1], self.tokens.max_length
        if most is not None and length > most:
            reason = f"the row has {length:,} tokens, more than max_length {most:,} (it is not cut: an image's tokens belong together)"
            return Refused(reason, dropped=self.settings.on_too_long == "drop")
        return inputs

    def _with_image(self, words: str) -> str:
        """The text with the place of the image, as the model's chat template writes it, else before the text."""
        processor = self._processor
        if getattr(processor, "chat_template", None):
            parts = [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
            rendered: str = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
            return rendered
        token = getattr(processor, "image_token", None)
        if token is None:
            raise UsageError(f"{self.folder.root}: its processor does not say which token stands for an image")
        return f"{token}{words}"

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.model(**inputs).last_hidden_state
        mode = "last" if self.settings.pooling == "auto" else self.settings.pooling
        return pool(hidden, [mode])


def _open(kind: Any, folder: EmbeddingFolder) -> Any:
    with quiet():
        try:
            return kind.from_pretrained(str(folder.weights), backend="pil")
        except ImportError as error:
            raise MissingError(f"{folder.root}: its processor of images wants a package: {_first(error)}") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{folder.root} has no processor that can be used for images: {_first(error)}") from error


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
