"""Embedding as a batch job: rows of a file to a column of vectors (see ``llmkit.inference.batch``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from llmkit.errors import DataError
from llmkit.inference.batch.work import Computed, RowError
from llmkit.inference.embedding.embedder import Embedder
from llmkit.inference.embedding.folder import read_folder
from llmkit.inference.embedding.images import PairEmbedder, VisionLanguageEmbedder, image_key
from llmkit.inference.embedding.tokens import Refused
from llmkit.inference.embedding.vectors import Vectors, pack, ranges_of, read_ranges

if TYPE_CHECKING:
    from llmkit.stages.embed import Recipe

RANGES = "int8_ranges.npy"
_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}


class EmbedWork:
    """See ``llmkit.inference.batch.work.Work``. The tokenizer is opened at once, the weights with the first vectors."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._settings = recipe, recipe.embedding
        folder = read_folder(recipe.model.name_or_path, recipe.model.revision)
        self._texts: Embedder | None = None
        self._images: PairEmbedder | VisionLanguageEmbedder | None = None
        if folder.kind == "clip":
            self._images = PairEmbedder(recipe.model, self._settings, folder)
        elif self._settings.image is not None:
            self._images = VisionLanguageEmbedder(recipe.model, self._settings, folder)
        else:
            self._texts = Embedder(recipe.model, self._settings, folder=folder)

    def schema(self) -> pa.Schema:
        width = self._width // 8 if self._settings.precision == "binary" else self._width
        return pa.schema([(self._settings.column, pa.list_(_TYPES[self._settings.precision], width))])

    def identity(self) -> Mapping[str, Any]:
        found = (self._texts or self._images).identity()  # type: ignore[union-attr]
        return found | {"int8_ranges": _content(self._settings.int8_ranges)}

    def key(self, row: Mapping[str, Any]) -> bytes | None:
        text = row.get(self._settings.text) if self._settings.text is not None else None
        image = row.get(self._settings.image) if self._settings.image is not None else None
        if image is None:
            return text.encode() if isinstance(text, str) else None
        if not isinstance(image, str | bytes | dict):
            return None
        return image_key(image) + b"\0" + (text.encode() if isinstance(text, str) else b"")

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        texts = self._column(rows, self._settings.text)
        found: Sequence[Any]
        if self._texts is not None:
            found = self._texts.tokens(texts)
        else:
            assert self._images is not None
            found = self._images.prepare(texts, self._column(rows, self._settings.image))
        return [RowError(one.reason, dropped=one.dropped) if isinstance(one, Refused) else one for one in found]

    def compute(self, prepared: Sequence[Any]) -> Computed:
        before = self._passed()
        vectors = self._vectors(prepared)
        bad = dict.fromkeys(np.flatnonzero(~np.isfinite(vectors).all(1)), "the vector is not finite")
        vectors = np.nan_to_num(vectors, posinf=0.0, neginf=0.0) if bad else vectors
        kept = pack(vectors, self._settings.precision, self._ranges if self._settings.precision == "int8" else None)
        return Computed(
            {self._settings.column: kept}, {int(row): why for row, why in bad.items()}, self._passed() - before
        )

    def _vectors(self, prepared: Sequence[Any]) -> Vectors:
        return (self._texts or self._images).vectors(prepared)  # type: ignore[union-attr]

    def _passed(self) -> int:
        return self._texts.encoder.tokens if self._texts is not None else self._images.passed  # type: ignore[union-attr]

    @cached_property
    def _width(self) -> int:
        if self._texts is not None:
            return self._texts.dim
        assert self._images is not None
        return self._images.dim

    @cached_property
    def _ranges(self) -> Vectors:
        """Ranges of ``int8``: an earlier run's, or this run's, set by the first rows of its input and kept in its folder."""
        if self._settings.int8_ranges is not None:
            return read_ranges(self._settings.int8_ranges, self._width)
        path = Path(self._recipe.output_dir) / RANGES
        if not path.is_file():
            ranges = ranges_of(self._vectors(self._first_rows()))
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            with part.open("wb") as stream:
                np.save(stream, ranges)
            part.replace(path)
        return read_ranges(path, self._width)

    def _first_rows(self) -> list[Any]:
        from llmkit.inference.batch.reading import rows_of

        rows = list(islice(rows_of(self._recipe.input), self._settings.calibration_rows))
        good = [one for one in self.prepare(rows) if not isinstance(one, RowError)]
        if len(good) < 2:
            raise DataError("embedding.precision: int8 needs two good rows at the input's beginning to set its ranges")
        return good

    def _column(self, rows: Sequence[Mapping[str, Any]], name: str | None) -> list[Any]:
        return [row.get(name) if name is not None else None for row in rows]


def _content(path: str | None) -> str | None:
    """Digest of a file of ranges, by which a resumed job knows it again."""
    if path is None or not Path(path).is_file():
        return path
    return "sha256:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()
