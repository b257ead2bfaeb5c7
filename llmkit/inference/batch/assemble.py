"""From the rows of a chunk to its shard: equal rows found, columns joined, bad rows taken out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa

from llmkit.data.rows import BadRow, RawRow
from llmkit.errors import DataError
from llmkit.inference.batch import reading
from llmkit.inference.batch.settings import BatchRecipe
from llmkit.inference.batch.work import Computed, RowError, Work

WINDOW = 4
"""Chunks before the present one in which equal rows are looked for: a bound on memory, and the same on every start."""

Outcome = RowError | int
"""Of one row of a chunk: why it has no output, or its place in the chunk's output."""


@dataclass
class Chunk:
    """One chunk on its way. ``origin`` says for each row where its output is made: ``(chunk, row)``, itself or an equal
    row before it; ``new`` are the rows that are computed here. A ``complete`` one has its shard from an earlier start."""

    number: int
    rows: Sequence[RawRow | BadRow]
    origin: list[tuple[int, int] | None] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    complete: bool = False

    def to_compute(self) -> list[Mapping[str, Any]]:
        return [row.data for i in self.new if isinstance(row := self.rows[i], RawRow)]


@dataclass
class Done:
    """What later chunks may copy from one: its added columns, and the outcome of each of its rows."""

    added: pa.Table
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Worked:
    """What was made of a chunk's new rows: for each of them a RowError or anything else, and the output of these."""

    ready: Sequence[Any]
    computed: Computed
    seconds: float


def work_out(work: Work, ready: Sequence[Any]) -> Worked:
    """Compute the rows that were prepared."""
    began = perf_counter()
    good = [one for one in ready if not isinstance(one, RowError)]
    computed = work.compute(good) if good else Computed({name: [] for name in work.schema().names})
    return Worked(ready, computed, perf_counter() - began)


class Equals:
    """Finds, for each row, the first row with the same key among this chunk and the ``WINDOW`` before it."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._first: dict[bytes, tuple[int, int]] = {}
        self._of_chunk: dict[int, list[bytes]] = {}

    def plan(self, number: int, rows: Sequence[RawRow | BadRow]) -> Chunk:
        chunk = Chunk(number, rows)
        mine = self._of_chunk.setdefault(number, [])
        for i, row in enumerate(rows):
            if isinstance(row, BadRow):
                chunk.origin.append(None)
                continue
            key = self._work.key(row.data)
            place = (number, i)
            if key is not None:
                short = blake2b(key, digest_size=16).digest()
                place = self._first.setdefault(short, place)
                if place == (number, i):
                    mine.append(short)
            chunk.origin.append(place)
            if place == (number, i):
                chunk.new.append(i)
        for key in self._of_chunk.pop(number - WINDOW, ()):
            del self._first[key]
        return chunk


def as_table(computed: Computed, schema: pa.Schema) -> pa.Table:
    """Computed columns as Arrow: arrays [n, d] become lists of fixed size."""
    return pa.table([_column(computed.columns[f.name], f.type) for f in schema], schema=schema)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), type=kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.array(values, type=kind)


def finish(chunk: Chunk, worked: Worked, schema: pa.Schema, before: Mapping[int, Done]) -> Done:
    """The added columns of a chunk's good rows, and the outcome of every row."""
    bad: dict[int, RowError] = {}
    place: dict[int, int] = {}
    for row, one in zip(chunk.new, worked.ready, strict=True):
        if isinstance(one, RowError):
            bad[row] = one
        else:
            place[row] = len(place)
    bad |= {row: RowError(worked.computed.errors[i]) for row, i in place.items() if i in worked.computed.errors}
    tables, start = [as_table(worked.computed, schema)], {chunk.number: 0}
    for number in sorted({at[0] for at in chunk.origin if at is not None and at[0] != chunk.number}):
        start[number] = sum(table.num_rows for table in tables)
        tables.append(before[number].added)
    taken: list[int] = []
    outcomes: list[Outcome] = []
    for raw, at in zip(chunk.rows, chunk.origin, strict=True):
        found: Outcome
        if at is None:
            assert isinstance(raw, BadRow)
            found = RowError(raw.reason)
        elif at[0] == chunk.number:
            found = bad.get(at[1]) or place[at[1]]
        else:
            found = before[at[0]].outcomes[at[1]]
        if isinstance(found, RowError):
            outcomes.append(found)
        else:
            assert at is not None
            outcomes.append(len(taken))
            taken.append(start[at[0]] + found)
    return Done(pa.concat_tables(tables).take(pa.array(taken, type=pa.int64())).combine_chunks(), outcomes)


def restored(table: pa.Table, schema: pa.Schema, errors: Mapping[int, RowError], read: int) -> Done:
    """The same of a shard that is complete already."""
    outcomes: list[Outcome] = []
    good = 0
    for position in range(read):
        if position in errors:
            outcomes.append(errors[position])
        else:
            outcomes.append(good)
            good += 1
    return Done(table.select(schema.names), outcomes)


class Kept:
    """The columns that are carried along. Their types are those of the first chunk that has rows; a later row that does
    not fit them is a bad row, so that all shards have one schema."""

    def __init__(
        self, keep: Sequence[str] | None, row_id: str | None, added: pa.Schema, schema: pa.Schema | None
    ) -> None:
        self._keep, self._row_id, self._added, self.schema = keep, row_id, added, schema

    def settle(self, rows: Sequence[RawRow | BadRow]) -> None:
        """Decide the schema by the first rows. DataError for columns that are not there, or twice."""
        data = [row.data for row in rows if isinstance(row, RawRow)]
        if self.schema is not None or not data:
            return
        names = list(self._keep if self._keep is not None else dict.fromkeys(name for row in data for name in row))
        there = {name for row in data for name in row}
        problems = [
            f"input.keep: no row has a column {name!r}; there are {', '.join(sorted(there))}"
            for name in names
            if name not in there
        ]
        all_names = [*names, *([self._row_id] if self._row_id else []), *self._added.names]
        problems += [f"the column {name!r} would be in the output twice: rename it, or leave it out of input.keep"
                     for name in sorted({n for n in all_names if all_names.count(n) > 1})]  # fmt: skip
        if problems:
            raise DataError("\n".join(problems))
        fields = [pa.field(name, _type_of([row.get(name) for row in data])) for name in names]
        self.schema = pa.schema([*fields, *([pa.field(self._row_id, pa.string())] if self._row_id else [])])

    def misfit(self, row: RawRow) -> str | None:
        """Why a row does not fit the schema; None where it does."""
        assert self.schema is not None
        if self._keep is None and (new := [name for name in row.data if name not in self.schema.names]):
            return f"the column {new[0]!r} is not in the first rows; name the columns to carry along as input.keep"
        for field_ in self.schema:
            value = row.data.get(field_.name)
            if value is None or field_.name == self._row_id:
                continue
            try:
                pa.scalar(value, type=field_.type)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                return (
                    f"the column {field_.name!r} is {field_.type} in the first rows, here it is {type(value).__name__}"
                )
        return None

    def fitting(self, row: RawRow | BadRow) -> RawRow | BadRow:
        """The row, or in its place why it does not fit."""
        if isinstance(row, BadRow):
            return row
        why = self.misfit(row)
        return row if why is None else BadRow(row.row_id, why)

    def table(self, rows: Sequence[RawRow]) -> pa.Table:
        assert self.schema is not None
        data = [row.data | ({self._row_id: row.row_id} if self._row_id else {}) for row in rows]
        arrays = [pa.array([row.get(f.name) for row in data], type=f.type) for f in self.schema]
        return pa.table(arrays, schema=self.schema)


def planned(recipe: BatchRecipe, work: Work, kept: Kept) -> Iterator[Chunk]:
    """Every chunk of the input, in order: the same in each process and on every start."""
    equals = Equals(work)
    for number, rows in enumerate(reading.chunks(recipe.input, recipe.output.rows_per_shard)):
        kept.settle(rows)
        yield equals.plan(number, [kept.fitting(row) for row in rows])


def _type_of(values: Sequence[Any]) -> pa.DataType:
    """The type of a column by its first values; text where there are none, or several kinds."""
    try:
        found = pa.infer_type(values)
    except pa.ArrowException:
        return pa.string()
    return pa.string() if pa.types.is_null(found) else found
