"""Packing: never over capacity, every row once, deterministic, and as tight as the plain algorithm (lesson 12)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.data.packing import best_fit, efficiency


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    """Number of bins of best-fit decreasing, written the slow and obvious way."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(st.integers(8, 200).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=120))))
def test_lesson_12_packing_keeps_whole_rows_within_capacity(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    rows = sorted(row for one in bins for row in one.tolist())
    assert rows == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in one.tolist()) <= capacity for one in bins)
    assert len(bins) == plain_best_fit(lengths, capacity)
    again = best_fit(np.array(lengths, dtype=np.int32), capacity)
    assert [one.tolist() for one in again] == [one.tolist() for one in bins]


def test_a_length_that_does_not_fit_is_refused() -> None:
    for lengths in ([9], [0], [3, -1]):
        with pytest.raises(ValueError, match="1 to 8"):
            best_fit(np.array(lengths), 8)


def test_efficiency_is_the_share_of_tokens() -> None:
    assert efficiency(np.array([3, 5, 8]), 2, 8) == 1.0
    assert efficiency(np.array([4]), 1, 8) == 0.5
    assert efficiency(np.array([], dtype=np.int64), 0, 8) == 0.0
