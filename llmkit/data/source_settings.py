"""Settings of one source of rows, wherever a recipe names one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmkit.recipe import Settings

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
COLUMN_FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "from", "value", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
}

Location = Annotated[str, Field(min_length=1)]


class SourceSettings(Settings):
    path: Location
    """A local path, a glob, an fsspec URI (``s3://…``) or a hub data set id."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this source in the mix: 2.0 takes each row twice an epoch, 0.5 a seeded half of the rows."""
    split: str = "train"
    """Split to take from a hub data set."""
    format: Format | None = None
    """Format of this source where it differs from ``data.format``."""
    columns: dict[str, str] | None = None
    """Columns of this source where they differ from ``data.columns``."""
    license: str | None = None
    """SPDX id of the licence, where no card beside the data says it; see ``data.guard.allow_licenses``."""


Sources = Location | SourceSettings | list[Location | SourceSettings]
