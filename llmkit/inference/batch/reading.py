"""The rows of a batch job, in their order, read as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from llmkit.data.readers import open_bytes, suffix_of
from llmkit.data.rows import BadRow, RawRow
from llmkit.data.sources import Source, digests_of, read
from llmkit.errors import DataError
from llmkit.inference.batch.settings import InputSettings


def sources(settings: InputSettings) -> list[Source]:
    several = len(settings.paths) > 1
    return [
        Source(f"input.path[{i}]" if several else "input.path", path, 1.0, "train", "text", {})
        for i, path in enumerate(settings.paths)
    ]


def digests(settings: InputSettings) -> Mapping[str, str]:
    """Digest of every input file by its name. DataError for a file that is not there or named twice."""
    names = [name for source in sources(settings) for name in source.files()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"input.path names {', '.join(twice)} more than once: its rows would be in the output twice.")
    return digests_of(sources(settings))


def raw_rows(settings: InputSettings) -> Iterator[RawRow | BadRow]:
    """Every row of every file in order, the damaged ones too."""
    for source in sources(settings):
        yield from read(source)


def rows_of(settings: InputSettings) -> Iterator[Mapping[str, Any]]:
    """The rows that can be read, for what looks at some of them before the job."""
    return (row.data for row in raw_rows(settings) if isinstance(row, RawRow))


def chunks(settings: InputSettings, size: int) -> Iterator[list[RawRow | BadRow]]:
    """The rows, ``size`` at a time: the same chunks whenever the job is started."""
    rows = raw_rows(settings)
    while chunk := list(islice(rows, size)):
        yield chunk


def count(settings: InputSettings) -> int | None:
    """Rows of the input, for the time that is left; None where only reading it all would tell."""
    total = 0
    for source in sources(settings):
        for path in source.files():
            rows = _count(path)
            if rows is None:
                return None
            total += rows
    return total


def _count(path: str) -> int | None:
    suffix = suffix_of(path)
    with open_bytes(path) as stream:
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                return int(pq.ParquetFile(stream).metadata.num_rows)
            except (pa.ArrowException, OSError):
                return None  # reading it will say what is wrong
        return sum(1 for line in stream if not line.isspace()) if suffix in (".jsonl", ".ndjson") else None
