"""Right labels, from a column of the input or a file of their own, for the rows of a shard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.data.readers import read_file
from llmkit.data.rows import BadRow
from llmkit.errors import DataError
from llmkit.labelling.agreement import MISSING
from llmkit.labelling.decide import same_text
from llmkit.labelling.labels import LabelSet
from llmkit.labelling.settings import GoldSettings

if TYPE_CHECKING:
    import pyarrow as pa


class Gold:
    """``known`` are the values of a gold file by key; None where they stand in the input."""

    def __init__(self, settings: GoldSettings, labels: LabelSet | None, known: Mapping[str, Any] | None) -> None:
        self._settings, self._labels, self._known = settings, labels, known
        self._others: dict[str, int] = {}

    def texts(self, shard: pa.Table) -> list[str | None]:
        """The right answers of a shard's rows; None for a row without one. Raises DataError for a missing column."""
        name = self._settings.column if self._known is None else str(self._settings.key)
        key = "gold.column" if self._known is None else "gold.key"
        if name not in shard.column_names:
            hint = "name it in input.keep" if self._known is None else "name it in input.keep too"
            raise DataError(f"{key}: the output has no column {name!r}; {hint}.")
        values = shard.column(name).to_pylist()
        found = values if self._known is None else [self._known.get(str(value)) for value in values]
        return [None if value is None or value == "" else _text(value) for value in found]

    def indices(self, shard: pa.Table) -> NDArray[np.int64]:
        """Indices [rows] of the right labels. One that is none of ``labels`` gets an index behind theirs: nothing that
        was found can equal it."""
        assert self._labels is not None
        made = []
        for text in self.texts(shard):
            index = MISSING if text is None else self._labels.find(text)
            if text is not None and index == MISSING:
                index = self._others.setdefault(text, len(self._labels) + len(self._others))
            made.append(index)
        return np.array(made, dtype=np.int64)


def open_gold(settings: GoldSettings | None, labels: LabelSet | None) -> Gold | None:
    """Read the gold labels of a recipe. Raises DataError for a file that cannot be used."""
    if settings is None:
        return None
    if settings.path is None:
        return Gold(settings, labels, None)
    known: dict[str, Any] = {}
    for row in read_file(settings.path):
        if isinstance(row, BadRow):
            raise DataError(f"gold.path: {row}")
        if missing := [name for name in (settings.key, settings.column) if name not in row.data]:
            raise DataError(f"gold.path: {row.row_id}: there is no column {missing[0]!r}.")
        key = str(row.data[str(settings.key)])
        if key in known and known[key] != row.data[settings.column]:
            raise DataError(f"gold.path: {row.row_id}: {settings.key} {key!r} is there twice, with two labels.")
        known[key] = row.data[settings.column]
    return Gold(settings, labels, known)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


@dataclass
class TextScore:
    """Answers against gold ones: whole ones, and the fields of those that are JSON objects."""

    rows: int = 0
    covered: int = 0
    equal: int = 0
    fields: int = 0
    equal_fields: int = 0

    def add(self, found: Sequence[str | None], gold: Sequence[str | None]) -> None:
        for answer, right in zip(found, gold, strict=True):
            if right is None:
                continue
            self.rows += 1
            self.covered += answer is not None
            wanted, got = _object(right), _object(answer)
            if wanted is None:
                self.equal += answer is not None and same_text(answer) == same_text(right)
                continue
            self.equal += got == wanted
            self.fields += len(wanted)
            self.equal_fields += sum((got or {}).get(key, _NONE) == value for key, value in wanted.items())


_NONE = object()


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
