"""Texts as arrays of 64-bit hashes, many texts at a time and without a Python loop over words.

Two views of a text, after NFKC and case folding:

- *shingles*, to compare whole rows: the substrings of 6 letters that begin at each letter, or of 3 characters in
  scripts that write a syllable or a word with one character (Han, Kana, Hangul). Words are one blank apart, punctuation
  is left out. A change of one word changes few of them, whatever the language.
- *n-grams of units*, to find a passage in a longer text: a unit is a word, or one such character.

The hashes are polynomials modulo 2**64 with a random odd base, mixed at the end by MurmurHash3's finalizer. Equal
pieces have equal hashes on every machine; of n different pieces, about n**2 / 2**65 pairs share one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

LETTERS, CHARACTERS = 6, 3
"""Length of a shingle in scripts with and without letters."""
LONGEST = 1_000_000
"""Characters of a text that are looked at."""
AT_ONCE = 500_000
"""Characters of many texts that are hashed together."""
_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_APART, _LETTER, _CHARACTER = 0, 1, 2
# Scripts without blanks between words, and Hangul, whose blanks people set freely.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1100, 0x11FF), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3130, 0x318F),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)  # fmt: skip


class Pieces(NamedTuple):
    """Hashes of the texts' pieces: text ``i`` has ``hashes[offsets[i]:offsets[i + 1]]``."""

    hashes: Hashes
    offsets: Offsets

    @property
    def counts(self) -> Offsets:
        return np.diff(self.offsets)

    @property
    def owners(self) -> Offsets:
        """Number of the text that each piece is of."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    def only(self, wanted: NDArray[np.bool_]) -> Pieces:
        """The wanted pieces, in order."""
        kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(wanted)])
        return Pieces(self.hashes[wanted], kept[self.offsets])


class Characters(NamedTuple):
    """Letters, digits and single blanks of texts: code points, their classes, and where each text begins."""

    codes: NDArray[np.uint64]
    classes: NDArray[np.uint8]
    offsets: Offsets


@cache
def _classes() -> NDArray[np.uint8]:
    """Class of every code point: apart from words, letter, or character that stands for itself."""
    table = np.zeros(0x110000, np.uint8)
    for code in range(0x32400):
        if chr(code).isalnum() or unicodedata.category(chr(code)) in ("Mn", "Mc"):
            table[code] = _LETTER
    for first, last in _UNSPACED:
        part = table[first : last + 1]
        part[part == _LETTER] = _CHARACTER
    table[0x3005:0x3008] = _CHARACTER
    return table


def characters(texts: Sequence[str]) -> Characters:
    """Fold texts together and take out what is no letter, digit or blank between words."""
    joined = "\0".join(text[:LONGEST] for text in texts)
    if joined.count("\0") != len(texts) - 1:
        joined = "\0".join(text[:LONGEST].replace("\0", " ") for text in texts)
    if not joined.isascii():
        joined = unicodedata.normalize("NFKC", joined)
    codes = np.frombuffer(joined.casefold().encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = codes == 0
    classes = _classes()[codes]
    # A blank stays between two letters only: where a run of what is apart ends, after a letter and before one.
    before = np.concatenate([np.zeros(1, np.uint8), _last_class(classes, ends)[:-1]])
    after = np.concatenate([classes[1:], np.zeros(1, np.uint8)])
    blank = (classes == _APART) & ~ends & (before == _LETTER) & (after == _LETTER)
    keep = (classes != _APART) | blank
    kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
    borders = np.flatnonzero(ends)
    starts = np.concatenate([np.zeros(1, np.int64), borders + 1])
    stops = np.concatenate([borders, np.array([len(codes)])])
    offsets = np.concatenate([kept[starts], kept[stops[-1:]]]).astype(np.int64)
    return Characters(np.where(blank, 32, codes)[keep].astype(np.uint64), classes[keep], offsets)


def _last_class(classes: NDArray[np.uint8], ends: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """At each place the class of the last character that is not apart, 0 after the end of a text."""
    known = np.where((classes != _APART) | ends, np.arange(len(classes)), 0)
    last: NDArray[np.uint8] = classes[np.maximum.accumulate(known)]
    return last


def mix(values: Hashes) -> Hashes:
    """MurmurHash3's 64-bit finalizer: every bit of the result depends on every bit of the value."""
    mixed = values ^ (values >> np.uint64(33))
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    return mixed


def windows(values: Hashes, length: int) -> Hashes:
    """Polynomial hash of every run of ``length`` values, unmixed; ``len(values) - length + 1`` of them."""
    count = max(0, len(values) - length + 1)
    hashed = values[:count].copy()
    for place in range(1, length):
        hashed *= _BASE
        hashed += values[place : place + count]
    return hashed


def _whole(values: Hashes) -> np.uint64:
    return np.uint64(windows(values, len(values))[0])


def shingles(texts: Sequence[str]) -> Pieces:
    """Shingles of each text, in order, repeats included; none of a text without letters and digits."""
    return _joined([_shingles(characters(part)) for part in _parts(texts)])


def _shingles(chars: Characters) -> Pieces:
    codes, classes, offsets = chars
    size = len(codes)
    ends = np.repeat(offsets[1:], np.diff(offsets))
    place = np.arange(size)
    hashed = np.zeros(size, np.uint64)
    fits = np.zeros(size, bool)
    for length, kind in ((LETTERS, _LETTER), (CHARACTERS, _CHARACTER)):
        found = windows(codes, length)
        here = (classes[: len(found)] == kind) & (place[: len(found)] + length <= ends[: len(found)])
        hashed[: len(found)][here] = found[here]
        fits[: len(found)] |= here
    pieces = Pieces(mix(hashed), offsets).only(fits)
    return _with_short_ones(pieces, codes, offsets)


def _with_short_ones(pieces: Pieces, values: Hashes, offsets: Offsets) -> Pieces:
    """A text that is shorter than one piece is one piece."""
    short = np.flatnonzero((pieces.counts == 0) & (np.diff(offsets) > 0))
    if not len(short):
        return pieces
    whole = np.array([_whole(values[offsets[row] : offsets[row + 1]]) for row in short.tolist()], np.uint64)
    hashes = np.insert(pieces.hashes, pieces.offsets[short], mix(whole))
    added = np.zeros(len(offsets), np.int64)
    added[short + 1] = 1
    return Pieces(hashes, pieces.offsets + np.cumsum(added))


def units(texts: Sequence[str]) -> tuple[Pieces, NDArray[np.bool_]]:
    """Units of each text (words, or single characters of unspaced scripts), and which texts are mostly characters."""
    parts = [_units(characters(part)) for part in _parts(texts)]
    mostly = np.concatenate([np.zeros(0, bool), *(found for _, found in parts)])
    return _joined([pieces for pieces, _ in parts]), mostly


def _units(chars: Characters) -> tuple[Pieces, NDArray[np.bool_]]:
    codes, classes, offsets = chars
    border = np.zeros(len(codes) + 1, bool)
    border[offsets] = True
    letter = classes == _LETTER
    letter &= codes != 32
    before = np.concatenate([np.zeros(1, bool), letter[:-1]])
    starts = (classes == _CHARACTER) | (letter & (~before | border[:-1]))
    after = np.concatenate([letter[1:], np.zeros(1, bool)])
    stops = (classes == _CHARACTER) | (letter & (~after | border[1:]))
    first, last = np.flatnonzero(starts), np.flatnonzero(stops) + 1
    hashes = mix(_spans(codes, first, last))
    borders = np.searchsorted(first, offsets)
    single = np.concatenate([np.zeros(1, np.int64), np.cumsum(classes[first] == _CHARACTER)])
    return Pieces(hashes, borders), 2 * np.diff(single[borders]) > np.diff(borders)


def _spans(values: Hashes, first: Offsets, last: Offsets) -> Hashes:
    """Polynomial hash of ``values[first:last]`` for many spans: prefix sums of ``value * base**place``, shifted back.

    The base is odd, so it has an inverse modulo 2**64.
    """
    powers, inverses = _powers(len(values) + 1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((values + np.uint64(1)) * powers[: len(values)])])
    spans: Hashes = (sums[last] - sums[first]) * inverses[first]
    return spans


_TABLES: list[Hashes] = []


def _powers(size: int) -> tuple[Hashes, Hashes]:
    """Powers of the base and of its inverse; the tables are made once a process."""
    if not _TABLES or len(_TABLES[0]) < size:
        length = max(size, AT_ONCE + AT_ONCE // 4)
        inverse = np.uint64(pow(int(_BASE), -1, 2**64))
        one = np.ones(1, np.uint64)
        _TABLES[:] = [np.concatenate([one, np.cumprod(np.full(length, base, np.uint64))]) for base in (_BASE, inverse)]
    return _TABLES[0], _TABLES[1]


def ngrams(unit: Pieces, length: int, texts: NDArray[np.bool_] | None = None) -> Pieces:
    """Hashes of every ``length`` successive units of each text; none of a text with fewer (or not in ``texts``)."""
    found = windows(unit.hashes, length)
    ends = np.repeat(unit.offsets[1:], unit.counts)[: len(found)]
    fits = np.arange(len(found)) + length <= ends
    if texts is not None:
        fits &= np.repeat(texts, unit.counts)[: len(found)]
    offsets = np.minimum(unit.offsets, len(found))
    return Pieces(mix(found), offsets).only(fits)


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in groups of about AT_ONCE characters."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text) > AT_ONCE:
            yield part
            part, size = [], 0
        part.append(text)
        size += min(len(text), LONGEST)
    if part:
        yield part


def _joined(parts: Sequence[Pieces]) -> Pieces:
    if len(parts) == 1:
        return parts[0]
    counts = np.concatenate([np.zeros(1, np.int64), *(part.counts for part in parts)])
    return Pieces(np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in parts)]), np.cumsum(counts))


def unique_pairs(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The different pairs of two arrays of one length, sorted by the first, then the second."""
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    new = np.concatenate([np.ones(min(1, len(a)), bool), (a[1:] != a[:-1]) | (b[1:] != b[:-1])])
    return a[new], b[new]


def sets(pieces: Pieces) -> Iterator[Hashes]:
    """The different hashes of each text, sorted."""
    offsets = pieces.offsets.tolist()
    for start, end in zip(offsets, islice(offsets, 1, None), strict=False):
        yield np.unique(pieces.hashes[start:end])


def jaccard(a: Hashes, b: Hashes) -> float:
    """Share of the different hashes that both sorted sets have; 0 for two empty sets."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)
