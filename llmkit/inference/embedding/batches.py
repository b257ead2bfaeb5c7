"""Which rows go through the model together: equal ones once, rows with a shared beginning together, within a token budget.

Everything here is a function of the token ids alone, so that a job that was killed makes the same batches again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Ids = np.ndarray
"""Token ids of a text, int32 ``[tokens]``."""

LEAST_PREFIX = 8
"""A shared beginning of fewer tokens is not worth a batch of its own."""
LEAST_ROWS = 4
LEAST_SAVED = 128
"""Nor is one that saves fewer tokens than this."""
_LEVELS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Family:
    """Rows (indices) whose first ``shared`` tokens are the same; 0 for rows that have nothing in common."""

    rows: tuple[int, ...]
    shared: int


def distinct(sequences: Sequence[Ids]) -> tuple[list[Ids], np.ndarray]:
    """The different sequences, in the order of their first appearance, and for each of the given which one it is."""
    seen: dict[bytes, int] = {}
    found: list[Ids] = []
    which = np.empty(len(sequences), dtype=np.int64)
    for index, ids in enumerate(sequences):
        key = ids.tobytes()
        if key not in seen:
            seen[key] = len(found)
            found.append(ids)
        which[index] = seen[key]
    return found, which


def families(sequences: Sequence[Ids]) -> list[Family]:
    """Rows put together by what they begin with, for a causal model; the sequences are all different.

    Sorted, rows with the same beginning are neighbours. Runs of neighbours that share at least L tokens are looked at
    for several L, and the L whose runs save most tokens is taken; what is in no run comes as one family without prefix.
    """
    everything = Family(tuple(range(len(sequences))), 0)
    if len(sequences) < LEAST_ROWS:
        return [everything]
    order = sorted(range(len(sequences)), key=lambda row: sequences[row].astype(">i4").tobytes())
    common = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    if max(common) < LEAST_PREFIX:
        return [everything]
    best: list[Family] = []
    for level in _LEVELS:
        found = _runs(sequences, order, common, level)
        if _saved(found) > _saved(best):
            best = found
    taken = {row for family in best for row in family.rows}
    rest = tuple(row for row in everything.rows if row not in taken)
    return [*best, Family(rest, 0)] if rest else best


def cut(lengths: Sequence[int], budget: int, *, padded: bool = False) -> list[list[int]]:
    """Rows sorted by length, longest first, in batches of at most ``budget`` tokens (a longer row alone).

    ``padded`` counts every row as long as the longest of its batch.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches: list[list[int]] = []
    used = budget
    longest = 0
    for row in order:
        cost = longest if padded else lengths[row]
        if not batches or used + cost > budget:
            batches.append([])
            used, longest = 0, lengths[row]
            cost = lengths[row]
        batches[-1].append(row)
        used += cost
    return batches


def _common(a: Ids, b: Ids) -> int:
    """How many tokens two sequences begin with together."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _runs(sequences: Sequence[Ids], order: list[int], common: list[int], level: int) -> list[Family]:
    found: list[Family] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and common[end - 1] >= level:
            continue
        rows = order[start:end]
        if len(rows) >= LEAST_ROWS:
            # every row keeps a token of its own: the one whose state is asked for
            shared = min(min(common[start : end - 1]), min(len(sequences[row]) for row in rows) - 1)
            family = Family(tuple(rows), shared)
            if shared >= LEAST_PREFIX and _saved([family]) >= LEAST_SAVED:
                found.append(family)
        start = end
    return found


def _saved(found: Sequence[Family]) -> int:
    return sum((len(family.rows) - 1) * family.shared for family in found)
