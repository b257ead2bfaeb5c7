"""Texts to token ids: the prompt, the longest length, and what becomes of longer texts. Needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from llmkit.errors import UsageError
from llmkit.inference.embedding.batches import Ids
from llmkit.inference.embedding.folder import EmbeddingFolder
from llmkit.inference.embedding.settings import EmbeddingSettings
from llmkit.modeling.load import quiet
from llmkit.modeling.locate import BaseInfo, find_base

_NO_LIMIT = 10**6


@dataclass(frozen=True)
class Refused:
    """A row that has no vector: why, and whether a setting said that it is to be left out (``dropped``)."""

    reason: str
    dropped: bool = False


class Tokens:
    """The tokenizer of an embedding model. ``prompt`` is the text before every text, ``prompt_tokens`` its size,
    ``max_length`` the longest row in tokens (None: no limit), ``truncated`` counts the texts that were cut.

    Raises UsageError for a prompt that the folder does not have, and for a length that the model cannot take.
    """

    def __init__(
        self, folder: EmbeddingFolder, settings: EmbeddingSettings, *, trust_remote_code: bool = False
    ) -> None:
        self._tokenizer, config = _open(folder, trust_remote_code)
        self._lower, self._policy = folder.lower_case, settings.on_too_long
        self.prompt = _prompt(folder, settings)
        self.max_length = _longest(folder, settings, self._tokenizer, config)
        self.prompt_tokens = self._size(self.prompt) if self.prompt else 0
        self.truncated = 0

    def __call__(self, texts: Sequence[Any]) -> list[Ids | Refused]:
        """Token ids of each text, or why it has none."""
        good = [row for row, text in enumerate(texts) if isinstance(text, str)]
        found: list[Ids | Refused] = [Refused(_not_text(text)) for text in texts]
        whole = [self._whole(texts[row]) for row in good]
        for row, ids in zip(good, self._ids(whole), strict=True):
            found[row] = self._fitting(ids, texts[row])
        return found

    @property
    def any_token(self) -> int:
        """Some token of the vocabulary, to try the model with."""
        return int(max(self._ids(["a"])[0], default=1))

    @property
    def pad_token(self) -> int:
        """The token that fills a row up, for models that want rows of one length."""
        found = self._tokenizer.pad_token_id
        return int(found if found is not None else self._tokenizer.eos_token_id or 0)

    def _fitting(self, ids: Ids, text: str) -> Ids | Refused:
        if not len(ids):
            return Refused("the text is empty")
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        if self._policy == "truncate":
            self.truncated += 1
            return self._ids([self._whole(text)], cut=True)[0]
        reason = f"the text has {len(ids):,} tokens, more than max_length {self.max_length:,}"
        if self._policy == "drop":
            return Refused(reason, dropped=True)
        return Refused(f"{reason} (embedding.on_too_long: truncate cuts it, drop leaves it out)")

    def _whole(self, text: str) -> str:
        whole = self.prompt + text
        return whole.lower() if self._lower else whole

    def _ids(self, texts: list[str], *, cut: bool = False) -> list[Ids]:
        if not texts:
            return []
        more: dict[str, Any] = {"truncation": True, "max_length": self.max_length} if cut else {}
        made = self._tokenizer(
            texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **more
        )["input_ids"]  # fmt: skip
        return [np.asarray(ids, dtype=np.int32) for ids in made]

    def _size(self, prompt: str) -> int:
        """Tokens at a row's beginning that are the prompt's: without the special token that ends a row."""
        ids = self._ids([prompt.lower() if self._lower else prompt])[0]
        ended = len(ids) and int(ids[-1]) in set(self._tokenizer.all_special_ids)
        return len(ids) - 1 if ended else len(ids)


def _open(folder: EmbeddingFolder, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, Any]:
    """Tokenizer and configuration; an adapter's folder may have both, one or none of them."""
    weights = folder.weights
    base = weights
    if folder.is_adapter:
        import json

        info = BaseInfo.read(weights)
        named = json.loads((weights / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = find_base(info.name_or_path, info.path, info.revision)[1] if info else find_base(named, named, None)[1]
    holder = weights if (weights / "tokenizer_config.json").is_file() else base
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(holder), trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code)
        except Exception as error:  # tokenizers raises plain Exception for a damaged file
            raise UsageError(f"The tokenizer of {holder} cannot be used: {str(error).splitlines()[0]}") from error
    return tokenizer, config


def _prompt(folder: EmbeddingFolder, settings: EmbeddingSettings) -> str:
    if settings.prompt is not None:
        return settings.prompt
    name = settings.prompt_name if settings.prompt_name is not None else folder.default_prompt
    if name is None:
        return ""
    if name not in folder.prompts and settings.prompt_name is not None:
        there = ", ".join(folder.prompts) or "none"
        raise UsageError(f"embedding.prompt_name: {folder.root} has no prompt {name}; it has {there}")
    return folder.prompts.get(name, "")


def _longest(folder: EmbeddingFolder, settings: EmbeddingSettings, tokenizer: Any, config: Any) -> int | None:
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and text.model_type in _OFFSET_POSITIONS:
        positions -= (text.pad_token_id or 0) + 1
    most = positions if isinstance(positions, int) and positions > 0 else None
    if settings.max_length is not None:
        if most is not None and settings.max_length > most:
            raise UsageError(
                f"embedding.max_length: {settings.max_length:,} is more than the model's {most:,} positions"
            )
        return settings.max_length
    limits = [folder.max_length, most]
    if folder.max_length is None:
        limits.append(tokenizer.model_max_length)
    return min((limit for limit in limits if limit is not None and 0 < limit < _NO_LIMIT), default=None)


_OFFSET_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "roberta-prelayernorm"}
)
"""Models whose first position is that behind the padding token's id, so that they have fewer than the table's rows."""


def _not_text(value: Any) -> str:
    return "there is no text" if value is None else f"expected a text, got {type(value).__name__}"
