"""Order, packing and layout: every row once, nothing across a border, the same on every restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.store import TokenStore
from llmkit.training.batching import (
    IGNORE,
    Batch,
    EpochOrder,
    Layout,
    Sequences,
    StreamedBatches,
    TokenRow,
    streamed_loader,
    train_loader,
)

MakeStore = Callable[..., TokenStore]


def row(name: str, length: int, learned: int) -> TokenRow:
    """The last ``learned`` tokens are learned."""
    ids = np.arange(1, length + 1, dtype=np.int32) + 10 * ord(name[0])
    labels = ids.copy()
    labels[: length - learned] = IGNORE
    return name, ids, labels


def shares(order: dict[str, Any], world_size: int, epoch: int = 0) -> list[list[list[int]]]:
    made = [EpochOrder(**order, rank=rank, world_size=world_size) for rank in range(world_size)]
    for one in made:
        one.set_epoch(epoch)
    return [list(one) for one in made]


orders = st.fixed_dictionaries({
    "count": st.integers(1, 60), "size": st.integers(1, 9), "seed": st.integers(0, 2**31), "shuffle": st.booleans(),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(order=orders, world_size=st.integers(1, 5), epoch=st.integers(0, 3))
def test_every_sequence_exactly_once_an_epoch(order: dict[str, Any], world_size: int, epoch: int) -> None:
    ranks = shares(order, world_size, epoch)
    steps = {len(batches) for batches in ranks}
    assert steps == {len(EpochOrder(**order, world_size=world_size))}, "a rank that stops early hangs the others"
    given_out = [i for batches in ranks for batch in batches for i in batch if i >= 0]
    assert sorted(given_out) == list(range(order["count"]))
    assert all(batch for batches in ranks for batch in batches)
    assert all(len(batch) <= order["size"] for batches in ranks for batch in batches)


@settings(max_examples=60, deadline=None)
@given(order=orders, world_size=st.integers(2, 5), epoch=st.integers(0, 3))
def test_the_ranks_together_do_what_one_process_does(order: dict[str, Any], world_size: int, epoch: int) -> None:
    """[11]: n processes with size s take the sequences, step by step, that one takes with size n * s."""
    ranks = shares(order, world_size, epoch)
    (alone,) = shares(order | {"size": order["size"] * world_size}, 1, epoch)
    together = [[i for rank in ranks for i in rank[step] if i >= 0] for step in range(len(ranks[0]))]
    assert together == alone


@settings(max_examples=40, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_order_depends_on_seed_and_epoch_only(order: dict[str, Any], epoch: int) -> None:
    (first,), (again,) = shares(order, 1, epoch), shares(order, 1, epoch)
    assert first == again
    used = EpochOrder(**order)
    for earlier in range(epoch):
        used.set_epoch(earlier)
        list(used)
    used.set_epoch(epoch)
    assert list(used) == first
    flat = [i for batch in first for i in batch]
    if not order["shuffle"]:
        assert flat == sorted(flat)


def test_epochs_and_seeds_differ() -> None:
    seen = {str(shares({"count": 50, "size": 4, "seed": seed, "shuffle": True}, 1, epoch))
            for seed in range(3) for epoch in range(3)}  # fmt: skip
    assert len(seen) == 9


def test_accelerate_skips_without_reading_and_hands_the_epoch_on(make_store: MakeStore) -> None:
    """What a resumed run does in transformers: skip_first_batches, then set_epoch."""
    from accelerate import skip_first_batches

    sequences = Sequences.of(make_store([4] * 10), packing=False, max_length=8)
    layout = Layout(flat=True, part_tokens=0, pad_id=0)
    whole = EpochOrder(10, 2, seed=1, shuffle=True)
    whole.set_epoch(2)
    expected = [batch.rows for batch in train_loader(sequences, layout, whole)]
    loader = skip_first_batches(train_loader(sequences, layout, EpochOrder(10, 2, seed=1, shuffle=True)), 3)
    loader.batch_sampler.batch_sampler.set_epoch(2)
    assert [batch.rows for batch in loader] == expected[3:]


def test_a_rank_without_a_row_has_nothing_to_learn(make_store: MakeStore) -> None:
    sequences = Sequences.of(make_store([4, 5, 6]), packing=False, max_length=8)
    layout = Layout(flat=True, part_tokens=0, pad_id=0)
    batches = [list(train_loader(sequences, layout, EpochOrder(3, 2, seed=0, shuffle=False, rank=r, world_size=2)))
               for r in (0, 1)]  # fmt: skip
    assert [len(b) for b in batches] == [1, 1]
    assert batches[1][0].supervised > 0
    (short,) = train_loader(sequences, layout, EpochOrder(3, 3, seed=0, shuffle=False, rank=1, world_size=2))
    assert short.supervised == 0
    assert short.parts


rows_strategy = st.lists(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=6
)


def sequences_of(shape: list[list[tuple[int, int]]]) -> list[list[TokenRow]]:
    names = iter("abcdefghijklmnopqrstuvwxyz")
    return [[row(next(names), length, min(learned, length)) for length, learned in rows] for rows in shape]


@settings(max_examples=80, deadline=None)
@given(shape=rows_strategy, part_tokens=st.integers(0, 60), flat=st.booleans())
def test_parts_never_split_a_sequence_and_respect_their_size(
    shape: list[list[tuple[int, int]]], part_tokens: int, flat: bool
) -> None:
    sequences = sequences_of(shape)
    layout = Layout(flat=flat, part_tokens=part_tokens, pad_id=0)
    groups = list(layout._groups(sequences))
    batch = layout.batch(sequences)
    lengths = [sum(len(r[1]) for r in sequence) for sequence in sequences]
    assert [r for group in groups for r in group] == [r for sequence in sequences for r in sequence]
    for group, part in zip(groups, batch.parts, strict=True):
        first = sequences[[s[0][0] for s in sequences].index(group[0][0])]
        size = sum(len(r[1]) for r in group)
        assert part.tokens == size
        assert not part_tokens or size <= part_tokens or len(group) == len(first), "two sequences, and too many tokens"
    ends = {s[-1][0] for s in sequences}
    assert all(group[-1][0] in ends for group in groups)
    if not part_tokens:
        assert len(groups) == 1
    assert batch.tokens == sum(lengths)
    assert batch.rows == [r[0] for s in sequences for r in s]
    # the first token of a row is never predicted
    assert batch.supervised == sum(int((r[2][1:] != IGNORE).sum()) for s in sequences for r in s)


@settings(max_examples=60, deadline=None)
@given(shape=rows_strategy)
def test_labels_are_shifted_and_never_cross_rows(shape: list[list[tuple[int, int]]]) -> None:
    """[12]: the last token of a row predicts nothing, positions restart, and segments say where rows end."""
    sequences = sequences_of(shape)
    (part,) = Layout(flat=True, part_tokens=0, pad_id=0).batch(sequences).parts
    rows = [r for s in sequences for r in s]
    lengths = [len(r[1]) for r in rows]
    filler = -sum(lengths) % 32  # flat sequences are a multiple of 32 positions
    assert part.inputs["segments"] == (*lengths, *([filler] if filler else []))
    assert part.tokens == sum(lengths)
    assert part.positions == part.tokens + filler == part.inputs["input_ids"].numel() == len(part.targets)
    assert part.targets[part.tokens :].tolist() == [IGNORE] * filler
    start = 0
    for _, ids, labels in rows:
        here = slice(start, start + len(ids))
        assert part.inputs["input_ids"][0, here].tolist() == ids.tolist()
        assert part.inputs["position_ids"][0, here].tolist() == list(range(len(ids)))
        assert part.targets[here].tolist() == [*labels[1:].tolist(), IGNORE]
        start += len(ids)


def test_padded_layout() -> None:
    (part,) = Layout(flat=False, part_tokens=0, pad_id=9).batch([[row("a", 3, 2)], [row("b", 5, 1)]]).parts
    assert part.inputs["input_ids"].tolist() == [[971, 972, 973, 9, 9], [981, 982, 983, 984, 985]]
    assert part.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert part.targets.tolist() == [972, 973, *[IGNORE] * 3, *[IGNORE] * 3, 985, IGNORE]
    assert (part.supervised, part.tokens, part.positions) == (3, 8, 10)
    assert part.inputs["input_ids"].dtype == part.targets.dtype == torch.int64


def test_sequence_to_sequence_layout() -> None:
    """The answer has a length of its own and is not shifted here: the decoder's input is."""
    rows = [[("a", np.array([5, 6, 7], np.int32), np.array([8, 1], np.int32))],
            [("b", np.array([5], np.int32), np.array([4, 3, 2, 1], np.int32))]]  # fmt: skip
    (part,) = Layout(flat=False, part_tokens=0, pad_id=0, seq2seq=True).batch(rows).parts
    assert part.inputs["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert part.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert part.inputs["labels_for_decoder"].tolist() == [[8, 1, 0, 0], [4, 3, 2, 1]]
    assert part.targets.tolist() == [8, 1, IGNORE, IGNORE, 4, 3, 2, 1]
    assert (part.supervised, part.tokens, part.positions) == (6, 10, 14)


def test_packed_sequences_hold_every_row_once(make_store: MakeStore) -> None:
    lengths = [3, 9, 4, 7, 1, 10, 2, 2]
    packed = Sequences.of(make_store(lengths), packing=True, max_length=10)
    names = [r[0] for i in range(len(packed)) for r in packed[i]]
    assert sorted(names) == sorted(f"rows.jsonl:{i + 1}" for i in range(len(lengths)))
    assert all(sum(len(r[1]) for r in packed[i]) <= 10 for i in range(len(packed)))
    assert len(packed) == 4
    nothing = packed[~1]
    assert [r[0] for r in nothing] == [r[0] for r in packed[1]]
    assert all((r[2] == IGNORE).all() for r in nothing)


def test_the_fingerprint_tells_what_is_learned_in_which_company(make_store: MakeStore) -> None:
    lengths = [3, 9, 4, 7]
    store = make_store(lengths)
    prints = {
        Sequences.of(store, packing=False, max_length=10).fingerprint(),
        Sequences.of(store, packing=True, max_length=10).fingerprint(),
        Sequences.of(store, packing=True, max_length=20).fingerprint(),
        Sequences.of(make_store([3, 9, 4, 6], name="other"), packing=False, max_length=10).fingerprint(),
    }
    assert len(prints) == 4
    assert Sequences.of(make_store(lengths, name="same"), packing=False, max_length=10).fingerprint() in prints


def test_bins_of_the_same_rows_in_the_same_order_but_cut_elsewhere_differ(make_store: MakeStore) -> None:
    store = make_store([2, 2, 2, 2])
    two, three = ([np.array(b) for b in bins] for bins in ([[0, 1], [2, 3]], [[0, 1, 2], [3]]))
    assert Sequences(store, two).fingerprint() != Sequences(store, three).fingerprint()


class Endless:
    """A stream of numbered rows without end."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def __iter__(self) -> Any:
        number = 0
        while True:
            yield row("s", self._lengths[number % len(self._lengths)], 1)
            number += 1


@pytest.mark.parametrize(("packing", "rows_a_batch"), [(False, [1, 1]), (True, [2, 1])])
def test_a_stream_is_packed_in_its_order(packing: bool, rows_a_batch: list[int]) -> None:
    layout = Layout(flat=True, part_tokens=0, pad_id=0)
    stream: Any = Endless([4, 5, 8])
    made = iter(streamed_loader(StreamedBatches(stream, layout, size=2, packing=packing, max_length=10)))
    batch: Batch = next(made)
    assert len(batch.rows) == sum(rows_a_batch)
    assert batch.parts[0].inputs["segments"] == ((4, 5, 8, 15) if packing else (4, 5, 23)), "filled up to 32 positions"
