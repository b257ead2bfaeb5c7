"""Token stores and loaded models for the training tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.data.rows import Encoded
from llmkit.data.store import TokenStore, TokenWriter

MakeStore = Callable[..., TokenStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """``make_store(lengths)``: a store of rows of these lengths; the first third of a row is not learned.

    Token ``j`` of row ``i`` is ``7 * i + j``, less than ``vocabulary``, so that every row is its own.
    """

    def make(
        lengths: Sequence[int], *, seq2seq: bool = False, vocabulary: int = 300, name: str = "train"
    ) -> TokenStore:
        rows = []
        for i, length in enumerate(lengths):
            ids = ((7 * i + np.arange(length)) % vocabulary).astype(np.int32)
            labels = np.flip(ids).copy()[: max(1, length // 2)] if seq2seq else ids.copy()
            if not seq2seq:
                labels[: length // 3] = -100
            rows.append(Encoded(f"rows.jsonl:{i + 1}", ids, labels))
        writer = TokenWriter(tmp_path / "work", name)
        writer.append(rows)
        path = tmp_path / f"{name}.arrow"
        writer.finish(path)
        return TokenStore(path)

    return make


@pytest.fixture
def load() -> Callable[[Path], Any]:
    """A tiny model by its folder."""

    def make(folder: Path, **kwargs: Any) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        kind = AutoModelForSeq2SeqLM if "t5" in folder.name else AutoModelForCausalLM
        return kind.from_pretrained(folder, **kwargs).eval()

    return make
