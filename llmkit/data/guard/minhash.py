"""Near duplicates: MinHash signatures, bands to find candidates, true Jaccard similarity to decide.

Sources: Broder, "On the resemblance and containment of documents", 1997 (the share of equal minima of random hash
functions is an unbiased estimate of the Jaccard similarity of two sets); Indyk and Motwani, 1998, and Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", ch. 3.4 (rows that agree in all r hashes of one of b bands are
candidates, which two sets of similarity s become with probability 1 - (1 - s**r)**b).

Of every row 2 bytes a permutation and 8 a band are kept, in files; in memory are 8 bytes a row and band that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.ngrams import Hashes, Offsets, Pieces, mix

FOUND = 0.99
"""Share of the pairs right at the threshold that the bands must bring up as candidates."""
_SLACK = 4.0
_BLOCK = 20_000
_ROUNDS = 64
Signature = NDArray[np.uint16]
Pairs = NDArray[np.int64]


def rows_in_a_band(threshold: float, permutations: int) -> int:
    """The most hashes a band for which pairs at the threshold are still found with probability FOUND."""
    best = 1
    for rows in range(1, permutations + 1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= FOUND:
            best = rows
    return best


class MinHasher:
    """Signatures of rows, a chunk at a time. ``bands`` is the number of band keys that each row gets."""

    def __init__(self, threshold: float, permutations: int) -> None:
        self.rows = rows_in_a_band(threshold, permutations)
        self.bands = permutations // self.rows
        self.permutations = permutations
        # x -> a * x modulo 2**64 with an odd a is a permutation; the hashes are mixed well before.
        random = np.random.default_rng(0x5EED)
        self._factors = random.integers(0, 2**63, permutations, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def __call__(self, pieces: Pieces) -> tuple[Signature, Hashes]:
        """Signatures, uint16 of (texts, permutations), and band keys, uint64 of (texts, bands).

        A text without shingles gets zeros.
        """
        texts = len(pieces.offsets) - 1
        full = np.flatnonzero(pieces.counts)
        minima = np.zeros((self.permutations, texts), np.uint64)
        starts = pieces.offsets[full]
        if len(full):
            scaled = np.empty_like(pieces.hashes)
            for row, factor in enumerate(self._factors):
                np.multiply(pieces.hashes, factor, out=scaled)
                minima[row, full] = np.minimum.reduceat(scaled, starts)
        # The high bits of a minimum are mostly zero; mixed, any 16 bits tell two apart.
        signature = (mix(minima) & np.uint64(0xFFFF)).astype(np.uint16).T
        keys = np.zeros((texts, self.bands), np.uint64)
        for band in range(self.bands):
            keys[full, band] = _key(minima[band * self.rows : (band + 1) * self.rows, full])
        return np.ascontiguousarray(signature), keys


def _key(minima: Hashes) -> Hashes:
    """One hash of the minima of a band, a column each; never 0, which is the key of a text without shingles."""
    hashed = np.zeros(minima.shape[1], np.uint64)
    for row in minima:
        hashed = mix(hashed ^ row) + np.uint64(0x9E3779B97F4A7C15)
    return np.maximum(hashed, np.uint64(1))


class Clusters:
    """Union-find over row numbers; the smallest number of a cluster stands for it."""

    def __init__(self, rows: int) -> None:
        self._parent = np.arange(rows, dtype=np.int64)

    def find(self, row: int) -> int:
        parent = self._parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    def unite(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def unite_pairs(self, pairs: Pairs) -> None:
        for a, b in pairs.tolist():
            self.unite(a, b)

    def labels(self) -> Offsets:
        """For each row the row that stands for its cluster."""
        while True:
            above = self._parent[self._parent]
            if np.array_equal(above, self._parent):
                return self._parent.copy()
            self._parent = above


class Bands:
    """Band keys and signatures in files of a folder, written chunk by chunk and read band by band."""

    def __init__(self, folder: Path, hasher: MinHasher) -> None:
        self._hasher = hasher
        self._keys = [folder / f"band{number}.u64" for number in range(hasher.bands)]
        self._signatures = folder / "signatures.u16"
        for path in [*self._keys, self._signatures]:
            path.write_bytes(b"")
        self.rows = 0

    def append(self, signatures: Signature, keys: Hashes) -> None:
        """Add the rows of a chunk: (rows, permutations) and (rows, bands)."""
        self.rows += len(keys)
        with self._signatures.open("ab") as stream:
            stream.write(signatures.tobytes())
        for number, path in enumerate(self._keys):
            with path.open("ab") as stream:
                stream.write(keys[:, number].tobytes())

    def each(self) -> Iterator[Hashes]:
        """Keys of all rows, one band after the other."""
        for path in self._keys:
            yield np.fromfile(path, np.uint64)

    def likely(self, pairs: Pairs, threshold: float) -> NDArray[np.bool_]:
        """Which pairs may reach the threshold, judged by their signatures: four standard errors below it are allowed."""
        width = self._hasher.permutations
        stored = np.memmap(self._signatures, np.uint16, "r", shape=(self.rows, width))
        least = threshold - _SLACK * np.sqrt(threshold * (1 - threshold) / width)
        found = np.zeros(len(pairs), bool)
        for start in range(0, len(pairs), _BLOCK):
            part = pairs[start : start + _BLOCK]
            found[start : start + _BLOCK] = (stored[part[:, 0]] == stored[part[:, 1]]).mean(axis=1) >= least
        return found


Similar = Callable[[Pairs], NDArray[np.bool_]]
"""Decides about pairs of rows, an array of (pairs, 2), by their true similarity."""


def join_near(bands: Bands, rows: Offsets, threshold: float, similar: Similar, clusters: Clusters) -> int:
    """Unite near duplicates among ``rows`` (sorted row numbers); gives the number of pairs whose similarity was computed.

    Within a bucket, rows are held against the first one, and those that are not like it against the next: a bucket of
    n equal rows costs n comparisons, not n**2.
    """
    compared = 0
    for keys in bands.each():
        left = rows[keys[rows] != 0]
        for _ in range(_ROUNDS):
            pairs = _against_first(left, keys[left])
            if not len(pairs):
                break
            labels = clusters.labels()
            apart = labels[pairs[:, 0]] != labels[pairs[:, 1]]
            near = ~apart
            ask = np.flatnonzero(apart)
            ask = ask[bands.likely(pairs[ask], threshold)]
            compared += len(ask)
            near[ask] = similar(pairs[ask])
            clusters.unite_pairs(pairs[near & apart])
            left = np.sort(pairs[~near, 1])  # the first ones, and what is like them, are done
    return compared


def _against_first(rows: Offsets, keys: Hashes) -> Pairs:
    """Each row of a bucket paired with the bucket's first: (first, other)."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    begins = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), sorted_keys[1:] != sorted_keys[:-1]]))
    sizes = np.diff(np.append(begins, len(keys)))
    first = np.repeat(begins, sizes)
    others = np.flatnonzero(np.arange(len(keys)) != first)
    return np.stack([rows[order[first[others]]], rows[order[others]]], axis=1)
