"""Settings of a batch job: which rows, which columns are carried along, how the output is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field

from llmkit.recipe import Conflict, Recipe, Settings

Location = Annotated[str, Field(min_length=1)]


class InputSettings(Settings):
    path: Location | list[Location]
    """A file (JSONL, JSON, CSV, TSV, Parquet, Arrow; text ones also ``.gz``), a glob, a folder, an ``s3://`` URI, or a list of these."""
    keep: list[Location] | None = None
    """Columns that are carried along into the output, such as keys, timestamps and lineage; None carries all."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    def conflicts(self) -> Iterator[Conflict]:
        if not self.paths:
            yield Conflict("path", "is an empty list", "name a file, a glob or a folder")
        if self.keep is not None and (twice := {name for name in self.keep if self.keep.count(name) > 1}):
            yield Conflict("keep", f"names {', '.join(sorted(twice))} more than once")


class OutputSettings(Settings):
    rows_per_shard: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Input rows of each Parquet shard. A killed job computes at most this many rows again; rows are sorted by length, and equal ones found, within it and the four shards before."""
    row_id: str | None = None
    """Name of a column that says where a row comes from (``file:line``); None leaves it out."""


class BatchRecipe(Recipe):
    """What embed and its like have in common."""

    input: InputSettings
    """The rows that are worked on."""
    output: OutputSettings = OutputSettings()
    """How the output is kept."""
    max_errors: Annotated[int, Field(ge=0)] = 100
    """Rows that may fail, each kept in ``errors.jsonl`` with its reason; one more ends the job with exit code 3."""

    def input_digests(self) -> Mapping[str, str]:
        from llmkit.inference.batch.reading import digests

        return digests(self.input)
