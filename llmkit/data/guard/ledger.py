"""The rows that the guard has seen: about 60 bytes of each in memory, texts in a file, so that memory does not grow with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.features import Features
from llmkit.data.guard.ngrams import Hashes, Offsets
from llmkit.data.guard.view import view
from llmkit.data.rows import Sample


class Kept(NamedTuple):
    """A row read back: where it is from, what is asked, what is answered."""

    row_id: str
    question: str
    answer: str

    @property
    def whole(self) -> str:
        return f"{self.question}\n{self.answer}" if self.question else self.answer


class Ledger:
    """Rows in the order in which they were read, numbered from 0. ``finish`` makes the arrays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(b"")
        self._sizes: list[Offsets] = []
        self._features: list[tuple[Hashes, NDArray[np.int32], NDArray[np.uint8]]] = []
        self._places: list[list[Offsets]] = []
        self._read: list[int] = []
        self.rows = 0
        self.starts: list[int] = []

    def begin_source(self) -> None:
        """Rows from here on are of the next source."""
        self.starts.append(self.rows)
        self._places.append([])
        self._read.append(0)

    def append(self, samples: Sequence[Sample], places: Sequence[int], read: int, features: Features) -> None:
        """A chunk of ``read`` rows, of which the usable ones stood at ``places`` (numbers in the source)."""
        records = [_record(sample) for sample in samples]
        with self._path.open("ab") as stream:
            stream.write(b"".join(records))
        self._sizes.append(np.array([len(record) for record in records], np.int64))
        self._features.append((features.keys, features.lengths, features.languages))
        self._places[-1].append(np.array(places, np.int64))
        self._read[-1] += read
        self.rows += len(samples)

    def finish(self) -> None:
        """After the last row."""
        keys, lengths, languages = zip(*self._features, strict=True) if self._features else ([], [], [])
        self.keys = np.concatenate([np.zeros((0, 3), np.uint64), *keys])
        """(rows, 3): whole, question, answer."""
        self.lengths = np.concatenate([np.zeros((0, 2), np.int32), *lengths])
        self.languages = np.concatenate([np.zeros((0, 2), np.uint8), *languages])
        self._offsets = np.concatenate([np.zeros(1, np.int64), *self._sizes]).cumsum()
        self._features, self._sizes = [], []

    def __getitem__(self, row: int) -> Kept:
        return next(iter(self.get([row])))

    def get(self, rows: Iterable[int]) -> Iterable[Kept]:
        """These rows, read from the file one after the other."""
        with self._path.open("rb") as stream:
            for row in rows:
                stream.seek(int(self._offsets[row]))
                raw = stream.read(int(self._offsets[row + 1] - self._offsets[row]))
                yield Kept(*raw.decode("utf-8", "surrogatepass").split("\0"))

    def by_source(self, chosen: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """``chosen`` of the ledger's rows as masks over all rows of each source, unusable ones (False) included."""
        masks = []
        for source, (start, read) in enumerate(zip(self.starts, self._read, strict=True)):
            places = np.concatenate([np.zeros(0, np.int64), *self._places[source]])
            mask = np.zeros(read, bool)
            mask[places] = chosen[start : start + len(places)]
            masks.append(mask)
        return masks

    def labels_by_source(self, labels: Offsets) -> list[Offsets]:
        """A number of each row, spread over the sources like ``by_source``; -1 for unusable rows."""
        spread = []
        for source, (start, read) in enumerate(zip(self.starts, self._read, strict=True)):
            places = np.concatenate([np.zeros(0, np.int64), *self._places[source]])
            values = np.full(read, -1, np.int64)
            values[places] = labels[start : start + len(places)]
            spread.append(values)
        return spread


def _record(sample: Sample) -> bytes:
    row = view(sample)
    # texts hold no NUL: the formats refuse it
    return "\0".join((sample.row_id, row.question, row.answer)).encode("utf-8", "surrogatepass")
