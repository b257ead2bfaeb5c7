"""From token rows to the batches of a step: packing, order, and the tensors that the model takes.

The order is a function of the seed, the epoch and the number of processes only. So a resumed run skips what was done
without reading it, and every rank knows its share without asking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from llmkit.data.packing import best_fit
from llmkit.data.store import TokenStore
from llmkit.data.stream import TokenStream
from llmkit.training.shapes import rounded_up

IGNORE = -100
Bin = NDArray[np.int64]
TokenRow = tuple[str, NDArray[np.int32], NDArray[np.int32]]


@dataclass
class Part:
    """What goes through the model at once. Flat: ``inputs`` of ``[1, tokens]``; padded: of ``[rows, longest]``.

    ``targets`` is the flat list of labels of all positions that the output layer could be asked for, -100 where it is
    not: already shifted for causal models.
    """

    inputs: dict[str, Any]
    targets: Tensor
    supervised: int
    tokens: int
    positions: int
    """Positions computed, padding included."""


@dataclass
class Batch:
    """One process's share of one forward pass of the recipe (``per_device_train_batch_size`` sequences)."""

    parts: list[Part]
    rows: list[str] = field(default_factory=list)
    sequences: Sequence[Sequence[TokenRow]] = ()
    """What the parts were made of, to make smaller ones of it."""

    @property
    def supervised(self) -> int:
        return sum(part.supervised for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def positions(self) -> int:
        return sum(part.positions for part in self.parts)


@dataclass
class AtOnce:
    """Most sequences of a part, 0 for any number; it may shrink while the run goes on (fit.py)."""

    sequences: int = 0


@dataclass(frozen=True)
class Layout:
    """How rows become tensors. ``part_tokens`` 0 keeps a batch in one part."""

    flat: bool
    part_tokens: int
    pad_id: int
    seq2seq: bool = False
    at_once: AtOnce = field(default_factory=AtOnce)

    def batch(self, sequences: Sequence[Sequence[TokenRow]]) -> Batch:
        """Split the sequences into parts of at most ``part_tokens`` tokens (never inside a sequence)."""
        rows = [row[0] for sequence in sequences for row in sequence]
        make = self._flat if self.flat else self._padded
        return Batch([make(group) for group in self._groups(sequences)], rows, sequences)

    def filler(self) -> Part:
        """A part of one token with nothing to learn: keeps a process that has no more in step with the others."""
        row = ("", np.full(1, self.pad_id, np.int32), np.full(1, IGNORE, np.int32))
        return self.batch([[row]]).parts[0]

    def _groups(self, sequences: Sequence[Sequence[TokenRow]]) -> Iterator[list[TokenRow]]:
        group: list[TokenRow] = []
        held = count = 0
        for sequence in sequences:
            size = sum(len(ids) for _, ids, _ in sequence)
            too_long = self.part_tokens and held + size > self.part_tokens
            if group and (too_long or count == self.at_once.sequences):
                yield group
                group, held, count = [], 0, 0
            group.extend(sequence)
            held, count = held + size, count + 1
        if group:
            yield group

    def _flat(self, rows: list[TokenRow]) -> Part:
        tokens = sum(len(ids) for _, ids, _ in rows)
        if filler := rounded_up(tokens) - tokens:  # a row of padding at the end: few lengths, few kernels
            rows = [*rows, ("", np.full(filler, self.pad_id, np.int32), np.full(filler, IGNORE, np.int32))]
        ids = np.concatenate([ids for _, ids, _ in rows])
        targets = np.concatenate([_shifted(labels) for _, _, labels in rows])
        positions = np.concatenate([np.arange(len(ids)) for _, ids, _ in rows])
        segments = tuple(len(ids) for _, ids, _ in rows)
        inputs = {
            "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "segments": segments,
        }
        return _part(inputs, targets, tokens, len(ids))

    def _padded(self, rows: list[TokenRow]) -> Part:
        ids = _pad([ids for _, ids, _ in rows], self.pad_id)
        mask = _pad([np.ones(len(ids), np.int32) for _, ids, _ in rows], 0)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self.seq2seq:
            labels = _pad([labels for _, _, labels in rows], IGNORE)
            # The decoder reads the answer shifted by one; -100 there would be no token.
            inputs["labels_for_decoder"] = torch.from_numpy(np.where(labels == IGNORE, self.pad_id, labels))
            targets = labels
        else:
            targets = _pad([_shifted(labels) for _, _, labels in rows], IGNORE)
        tokens = sum(len(ids) for _, ids, _ in rows)
        positions = ids.size
        if self.seq2seq:
            tokens += sum(len(labels) for _, _, labels in rows)
            positions += targets.size
        return _part(inputs, targets.reshape(-1), tokens, positions)


def _part(inputs: dict[str, Any], targets: NDArray[Any], tokens: int, positions: int) -> Part:
    wanted = torch.from_numpy(targets.astype(np.int64))
    return Part(inputs, wanted, int((targets != IGNORE).sum()), tokens, positions)


def _shifted(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """The label of each position is the token after it; the last one of a row predicts nothing."""
    return np.append(labels[1:], np.int32(IGNORE))


def _pad(rows: list[NDArray[np.int32]], value: int) -> NDArray[np.int64]:
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Sequences(Dataset[list[TokenRow]]):
    """Packed or single rows of a store by number."""

    def __init__(self, store: TokenStore, bins: list[Bin]) -> None:
        self.store, self.bins = store, bins

    @classmethod
    def of(cls, store: TokenStore, *, packing: bool, max_length: int) -> Sequences:
        if packing:
            return cls(store, best_fit(store.lengths, max_length))
        return cls(store, [np.array([i]) for i in range(len(store))])

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[TokenRow]:
        """The rows of a sequence; of ``~index`` the same with nothing to learn."""
        if index < 0:
            return [(name, ids, np.full_like(labels, IGNORE)) for name, ids, labels in self[~index]]
        return [(self.store.row_id(int(row)), *self.store.row(int(row))) for row in self.bins[index]]

    def fingerprint(self) -> str:
        """Digest of which tokens are learned in which company: a checkpoint fits only the same."""
        sha = hashlib.sha256()
        sizes = np.array([len(rows) for rows in self.bins])
        for array in (self.store.offsets, self.store.input_ids, self.store.labels, sizes, np.concatenate(self.bins)):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()[:16]


class EpochOrder(Sampler[list[int]]):
    """Batches of sequence numbers for one rank, in a new seeded order each epoch.

    Step by step the ranks together take the next ``size * world_size`` sequences, whatever ``world_size`` is; the last
    batch of an epoch may be short. A rank that has none left then takes a sequence with nothing to learn, so that it
    takes part in the step without changing it.
    """

    def __init__(self, count: int, size: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.size, self.seed, self.shuffle = count, size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    @property
    def batch_sampler(self) -> EpochOrder:
        """accelerate looks for the inner sampler under this name to hand it the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // (self.size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.count)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.size
            share = order[start : start + self.size]
            yield [int(i) for i in share] if len(share) else [~int(order[0])]


def train_loader(sequences: Sequences, layout: Layout, order: EpochOrder) -> DataLoader[Batch]:
    return DataLoader(sequences, batch_sampler=order, collate_fn=layout.batch, num_workers=0)  # type: ignore[arg-type]


class StreamedBatches(IterableDataset[Batch]):
    """Batches of a stream; packed greedily, in the order in which rows come."""

    def __init__(self, stream: TokenStream, layout: Layout, *, size: int, packing: bool, max_length: int) -> None:
        self._stream, self._layout, self._size = stream, layout, size
        self._packing, self._max_length = packing, max_length

    def __iter__(self) -> Iterator[Batch]:
        sequences: list[list[TokenRow]] = []
        for sequence in self._sequences():
            sequences.append(sequence)
            if len(sequences) == self._size:
                yield self._layout.batch(sequences)
                sequences = []

    def _sequences(self) -> Iterator[list[TokenRow]]:
        current: list[TokenRow] = []
        held = 0
        for row in self._stream:
            if current and (not self._packing or held + len(row[1]) > self._max_length):
                yield current
                current, held = [], 0
            current.append(row)
            held += len(row[1])


def streamed_loader(batches: StreamedBatches) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None, num_workers=0)
