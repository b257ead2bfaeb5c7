"""Which rows go through the model together: nothing lost, nothing twice, equal ones and shared beginnings once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.inference.embedding.batches import Ids, cut, distinct, families


def ids(*tokens: int) -> Ids:
    return np.array(tokens, dtype=np.int32)


rows_of_tokens = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30).map(lambda row: ids(*row)), max_size=40)


@settings(deadline=None)
@given(rows_of_tokens)
def test_distinct_rows_give_all_rows_back(rows: list[Ids]) -> None:
    found, which = distinct(rows)
    assert [found[i].tolist() for i in which] == [row.tolist() for row in rows]
    assert len({row.tobytes() for row in found}) == len(found)


@settings(deadline=None)
@given(rows_of_tokens)
def test_families_hold_every_row_once_and_share_what_they_say(rows: list[Ids]) -> None:
    rows, _ = distinct(rows)
    found = families(rows)
    assert sorted(row for family in found for row in family.rows) == list(range(len(rows)))
    for family in found:
        beginnings = {rows[row][: family.shared].tobytes() for row in family.rows}
        assert len(beginnings) == 1 or not family.rows
        assert all(len(rows[row]) > family.shared for row in family.rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 120), st.booleans())
def test_batches_keep_to_the_budget_and_lose_no_row(lengths: list[int], budget: int, padded: bool) -> None:
    batches = cut(lengths, budget, padded=padded)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[row] for row in batch]
        assert sizes == sorted(sizes, reverse=True)
        used = max(sizes) * len(sizes) if padded else sum(sizes)
        assert used <= budget or len(batch) == 1


def test_two_instructions_are_two_families() -> None:
    first, second = range(100, 140), range(200, 230)
    rows = [ids(*first, i, 7) for i in range(8)] + [ids(*second, i) for i in range(8)] + [ids(1, 2, 3)]
    found = sorted(families(rows), key=lambda family: -family.shared)
    assert [(len(family.rows), family.shared) for family in found] == [(8, 40), (8, 30), (1, 0)]


def test_a_row_that_is_the_others_beginning_keeps_a_token() -> None:
    rows = [ids(*range(40)), *(ids(*range(40), i) for i in range(9))]
    (family,) = families(rows)
    assert family.shared == 39
    assert len(family.rows) == 10
