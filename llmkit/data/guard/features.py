"""What the guard keeps of a row: a few numbers. A chunk of rows goes in, arrays come out; it runs in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.audit import Audit
from llmkit.data.guard.kinds import Finding
from llmkit.data.guard.language import LANGUAGES, detect_all
from llmkit.data.guard.leaks import LeakIndex
from llmkit.data.guard.minhash import MinHasher, Signature
from llmkit.data.guard.ngrams import Hashes, Offsets, Pieces, sets, shingles
from llmkit.data.guard.privacy import PrivacyFilter
from llmkit.data.guard.quality import row_faults
from llmkit.data.guard.settings import Check, GuardSettings
from llmkit.data.guard.view import View, fingerprint, strings, view
from llmkit.data.rows import Sample

_CODES = {name: code for code, name in enumerate(LANGUAGES, 1)}


@dataclass(frozen=True)
class Task:
    """What a worker has to know: the settings, the shingles not to compare, and the folder of the leak index."""

    settings: GuardSettings
    common: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    index: str | None = None


class Features(NamedTuple):
    """Of a chunk of n rows."""

    keys: Hashes
    """(n, 3): fingerprints of the whole row, its question and its answer."""
    lengths: NDArray[np.int32]
    """(n, 2): characters of question and answer."""
    languages: NDArray[np.uint8]
    """(n, 2): languages of question and answer, numbers from 1 in LANGUAGES, 0 where unclear."""
    faults: list[tuple[int, Check, str]]
    """Row, check and reason."""
    personal: list[tuple[int, str]]
    """Rows with personal data, and of which kinds."""
    audit: Audit | None
    signatures: Signature
    bands: Hashes
    leaks: tuple[Offsets, NDArray[np.int64]]
    """Rows, and numbers of the test sets' n-grams in them."""


class Examiner:
    """Makes the features of chunks. Raises MissingError where a package that the settings need is not installed."""

    def __init__(self, task: Task) -> None:
        self._settings = settings = task.settings
        self._privacy = finder(settings)
        self._common = CommonShingles(task.common)
        near = settings.duplicates.near if settings.duplicates else None
        self._hasher = MinHasher(near.threshold, near.permutations) if near else None
        self._index = LeakIndex.open(Path(task.index)) if task.index else None
        self._checks = settings.quality.checks if settings.quality else []

    def __call__(self, source: str, samples: Sequence[Sample]) -> Features:
        views = [view(sample) for sample in samples]
        faults = [(n, *fault) for n, row in enumerate(views) for fault in row_faults(row, self._checks).items()]
        personal, audit = self._find_personal(source, samples)
        signatures, bands = self._signatures(views)
        return Features(
            keys=np.array([_keys(row) for row in views], np.uint64).reshape(len(views), 3),
            lengths=np.array([(len(r.question), len(r.answer)) for r in views], np.int32).reshape(len(views), 2),
            languages=self._languages(views),
            faults=faults,
            personal=personal,
            audit=audit,
            signatures=signatures,
            bands=bands,
            leaks=self._leaks(views),
        )

    def _find_personal(self, source: str, samples: Sequence[Sample]) -> tuple[list[tuple[int, str]], Audit | None]:
        if self._privacy is None:
            return [], None
        audit = self._privacy.audit()
        rows = []
        for number, sample in enumerate(samples):
            findings = [finding for text in strings(sample) for finding in self._privacy.find(text)]
            audit.add(source, findings)
            if findings:
                rows.append((number, in_words(findings)))
        return rows, audit

    def _languages(self, views: Sequence[View]) -> NDArray[np.uint8]:
        if "language" not in self._checks:
            return np.zeros((len(views), 2), np.uint8)
        names = detect_all([row.question for row in views] + [row.answer for row in views])
        return np.array([_CODES.get(name, 0) for name in names], np.uint8).reshape(2, len(views)).T

    def _signatures(self, views: Sequence[View]) -> tuple[Signature, Hashes]:
        if self._hasher is None:
            return np.zeros((len(views), 0), np.uint16), np.zeros((len(views), 0), np.uint64)
        return self._hasher(self._common.without(shingles([row.whole for row in views])))

    def _leaks(self, views: Sequence[View]) -> tuple[Offsets, NDArray[np.int64]]:
        if self._index is None or self._settings.leaks is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return self._index.look([row.whole for row in views], self._settings.leaks.ngram)


def _keys(row: View) -> tuple[int, int, int]:
    question, answer = fingerprint(row.question), fingerprint(row.answer)
    return (question * 0x9E3779B97F4A7C15 + answer) % 2**64, question, answer


def finder(settings: GuardSettings) -> PrivacyFilter | None:
    """Finds what the settings look for, whatever happens to it then (so no key is needed). None where nothing is."""
    privacy = settings.privacy
    return PrivacyFilter(privacy.kinds, "report", regions=privacy.regions) if privacy is not None else None


def in_words(findings: Sequence[Finding]) -> str:
    """What kinds of personal data were found, never which."""
    return f"personal data: {', '.join(sorted({finding.kind for finding in findings}))}"


class CommonShingles:
    """Shingles that a large share of the rows has: the words of a template, which make no two rows alike."""

    _BITS = 20

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = np.sort(hashes)
        self._table = np.zeros(1 << self._BITS, bool)
        self._table[self._slot(self._hashes)] = True

    @classmethod
    def of(cls, texts: Sequence[str], share: float, fewest: int = 20) -> Hashes:
        """The shingles that more than ``share`` of these different texts (and more than ``fewest``) have."""
        owned = [np.zeros(0, np.uint64), *sets(shingles(texts))]
        hashes, counts = np.unique(np.concatenate(owned), return_counts=True)
        return hashes[counts > max(fewest, share * len(texts))]

    def _slot(self, hashes: Hashes) -> NDArray[np.int64]:
        return (hashes >> np.uint64(64 - self._BITS)).astype(np.int64)

    def without(self, pieces: Pieces) -> Pieces:
        """The pieces that are not common; of a text that has no others, all."""
        if not len(self._hashes):
            return pieces
        maybe = np.flatnonzero(self._table[self._slot(pieces.hashes)])
        hashes = pieces.hashes[maybe]
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        own = np.ones(len(pieces.hashes), bool)
        own[maybe[self._hashes[place] == hashes]] = False
        left = np.zeros(len(pieces.offsets) - 1, np.int64)
        owners = pieces.owners
        np.add.at(left, owners[own], 1)
        return pieces.only(own | (left[owners] == 0))
