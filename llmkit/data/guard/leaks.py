"""Test data inside the training rows: an index of the test rows' n-grams, which every training row is held against.

Sources: Brown et al., "Language Models are Few-Shot Learners" (GPT-3), appendix C: 13-grams of words, those that many
documents share taken out; Chowdhery et al., "PaLM", section 8: a test example is contaminated from 70 % of its n-grams on.
Here the share is counted in one training row, so that scattered common phrases add up to nothing.

Memory: the index (12 bytes an n-gram of the test sets, mapped from files) and 16 bytes for each n-gram found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.ngrams import Hashes, Offsets, Pieces, ngrams, unique_pairs, units

TEMPLATE_ROWS = 10
"""An n-gram of more test rows than this (and than one in a hundred) is the template of the test set."""
PHRASE_ROWS = 100
"""An n-gram of more training rows than this is a phrase that everybody uses."""
_FILTER_BITS = 22


class Entries(NamedTuple):
    """Texts of the test sets to look for, a question or an answer each."""

    ngrams: Pieces
    rows: Offsets
    """Number of the test row that each text is of."""


def entries(texts: Sequence[str], rows: Offsets, length: int) -> Entries:
    """N-grams of each text: ``length`` words, or twice as many characters where a text is mostly characters."""
    unit, mostly = units(texts)
    words, chars = ngrams(unit, length, ~mostly), ngrams(unit, 2 * length, mostly)
    owner = np.concatenate([words.owners, chars.owners])
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(words.counts + chars.counts)])
    return Entries(Pieces(np.concatenate([words.hashes, chars.hashes])[order], offsets), rows)


class LeakIndex:
    """The different n-grams of the test sets, sorted, with the texts that have each. Files in a folder; ``open`` maps them."""

    NAMES = ("grams", "starts", "owners", "sizes", "rows")

    def __init__(
        self, grams: Hashes, starts: Offsets, owners: NDArray[np.int32], sizes: Offsets, rows: Offsets
    ) -> None:
        """``owners[starts[i]:starts[i + 1]]`` are the texts with gram ``i``; a text has ``sizes`` grams and is of ``rows``."""
        self.grams, self.starts, self.owners, self.sizes, self.rows = grams, starts, owners, sizes, rows
        self._table = np.zeros(1 << _FILTER_BITS, bool)
        self._table[_slot(grams)] = True

    @classmethod
    def build(cls, parts: Sequence[Entries], test_rows: int) -> LeakIndex:
        """Of each text, count every n-gram once, and leave out those of the test set's template."""
        counts = [len(part.rows) for part in parts]
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        owners = [part.ngrams.owners + base for part, base in zip(parts, before.tolist(), strict=False)]
        owner = np.concatenate([np.zeros(0, np.int64), *owners])
        gram = np.concatenate([np.zeros(0, np.uint64), *(part.ngrams.hashes for part in parts)])
        rows = np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)])
        gram, owner = unique_pairs(gram, owner)
        grams, starts, counts_of = np.unique(gram, return_index=True, return_counts=True)
        own = np.repeat(counts_of <= max(TEMPLATE_ROWS, test_rows // 100), counts_of)
        gram, owner = gram[own], owner[own]
        grams, starts = np.unique(gram, return_index=True)
        sizes = np.bincount(owner, minlength=len(rows)).astype(np.int64)
        return cls(grams, np.append(starts, len(gram)).astype(np.int64), owner.astype(np.int32), sizes, rows)

    def save(self, folder: Path) -> None:
        for name in self.NAMES:
            np.save(folder / f"leaks_{name}.npy", getattr(self, name))

    @classmethod
    def open(cls, folder: Path) -> LeakIndex:
        """Map the files that ``save`` wrote."""
        return cls(*(np.load(folder / f"leaks_{name}.npy", mmap_mode="r") for name in cls.NAMES))

    def look(self, texts: Sequence[str], length: int) -> tuple[Offsets, NDArray[np.int64]]:
        """N-grams of the index in these texts, each once a text: ``(number of the text, number of the n-gram)``."""
        if not len(self.grams):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        unit, _ = units(texts)
        found = [self._found(ngrams(unit, size)) for size in (length, 2 * length)]
        text = np.concatenate([part[0] for part in found])
        gram = np.concatenate([part[1] for part in found])
        if not len(text):
            return text, gram
        return unique_pairs(text, gram)

    def _found(self, pieces: Pieces) -> tuple[Offsets, NDArray[np.int64]]:
        maybe = np.flatnonzero(self._table[_slot(pieces.hashes)])
        hashes = pieces.hashes[maybe]
        place = np.minimum(np.searchsorted(self.grams, hashes), len(self.grams) - 1)
        here = self.grams[place] == hashes
        return np.searchsorted(pieces.offsets, maybe[here], side="right") - 1, place[here]


def _slot(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


@dataclass
class Overlaps:
    """Collects what ``look`` finds, chunk by chunk; of an n-gram that too many rows have, no more than PHRASE_ROWS."""

    index: LeakIndex

    def __post_init__(self) -> None:
        self._seen = np.zeros(len(self.index.grams), np.int64)
        self._rows: list[Offsets] = []
        self._grams: list[NDArray[np.int64]] = []

    def add(self, rows: Offsets, grams: NDArray[np.int64]) -> None:
        """``rows`` are numbers of training rows."""
        wanted = self._seen[grams] <= PHRASE_ROWS
        np.add.at(self._seen, grams, 1)
        self._rows.append(rows[wanted])
        self._grams.append(grams[wanted])

    def leaks(self, share: float) -> list[tuple[int, int, float]]:
        """``(training row, test row, share)`` for every training row that holds so much of a test row's text; sorted.

        The share is of the text's n-grams that are no phrases; texts without any are not compared.
        """
        index = self.index
        rows = np.concatenate([np.zeros(0, np.int64), *self._rows])
        grams = np.concatenate([np.zeros(0, np.int64), *self._grams])
        phrase = self._seen > PHRASE_ROWS
        rows, grams = rows[~phrase[grams]], grams[~phrase[grams]]
        gram_of = np.repeat(np.arange(len(index.grams)), np.diff(index.starts))
        sizes = index.sizes - np.bincount(index.owners[phrase[gram_of]], minlength=len(index.sizes))
        counts = np.diff(index.starts)[grams]
        # each n-gram found stands for every text that has it
        where = np.repeat(index.starts[:-1][grams] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        pairs = np.stack([np.repeat(rows, counts), index.owners[where].astype(np.int64)])
        both, found = np.unique(pairs, axis=1, return_counts=True)
        parts = found / np.maximum(sizes[both[1]], 1)
        leaked = parts >= share
        best: dict[tuple[int, int], float] = {}
        for row, text, part in zip(*both[:, leaked].tolist(), parts[leaked].tolist(), strict=True):
            pair = (row, int(index.rows[text]))
            best[pair] = max(part, best.get(pair, 0.0))
        return [(row, test, part) for (row, test), part in sorted(best.items())]
