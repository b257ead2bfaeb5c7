"""A work for tests of the batch layer: texts in capitals and their lengths, slowly where asked to, with rows that fail."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmkit.inference.batch.settings import BatchRecipe
from llmkit.inference.batch.work import Computed, RowError


class UpperWork:
    def __init__(self, recipe: BatchRecipe) -> None:
        self._seen = Path(recipe.output_dir).with_name("computed.txt")
        self._pause = float(os.environ.get("UPPER_PAUSE", "0"))

    def schema(self) -> pa.Schema:
        return pa.schema([("upper", pa.string()), ("vector", pa.list_(pa.float32(), 2))])

    def identity(self) -> Mapping[str, Any]:
        return {"work": os.environ.get("UPPER_VERSION", "1")}

    def key(self, row: Mapping[str, Any]) -> bytes | None:
        text = row.get("text")
        return text.encode() if isinstance(text, str) else None

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        return [self._prepare(row.get("text")) for row in rows]

    def _prepare(self, text: Any) -> Any:
        if not isinstance(text, str):
            return RowError("no text")
        return RowError("too long", dropped=True) if text == "long" else text

    def compute(self, prepared: Sequence[Any]) -> Computed:
        time.sleep(self._pause)
        with self._seen.open("a", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in prepared)
        with self._seen.with_name("pids.txt").open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        bad = {i: "cannot be capital" for i, text in enumerate(prepared) if text == "bad"}
        vectors = np.array([[len(text), text.count("a")] for text in prepared], dtype=np.float32)
        return Computed({"upper": [text.upper() for text in prepared], "vector": vectors}, bad, sum(map(len, prepared)))
