"""Settings of ``data:``, what a training stage reads and how rows become tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmkit.data.guard.settings import GuardSettings
from llmkit.data.source_settings import COLUMN_FIELDS, Format, Location, Sources, SourceSettings
from llmkit.recipe import Conflict, Settings

__all__ = [
    "COLUMN_FIELDS", "DataSettings", "EvalSplitSettings", "Format", "Location", "SourceSettings", "Sources",
]  # fmt: skip


class EvalSplitSettings(Settings):
    split: Annotated[float, Field(gt=0, lt=1)]
    """Share of the training rows held out, chosen by seed; duplicates of a row stay on one side."""


class DataSettings(Settings):
    free_text: ClassVar[frozenset[str]] = frozenset({"system", "chat_template"})

    train: Sources
    """Training rows: a path, a glob, a URI, a hub id, a mapping (``path``, ``weight``, …) or a list of these."""
    eval: EvalSplitSettings | Sources | None = None
    """Held-out rows: ``{split: 0.02}`` or a source like ``train``. None trains without evaluation."""
    format: Format = "auto"
    """Layout of a row; ``auto`` detects it from the columns and prints what it found."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of your columns for the fields of the format, e.g. ``{prompt: question, completion: answer}``."""
    system: str | None = None
    """System message put before conversations that have none."""
    chat_template: str | None = None
    """Jinja template (text, or path of a ``.jinja`` file) used instead of the tokenizer's own, and saved with the model."""
    supervise: Literal["all", "last"] = "all"
    """Which assistant turns are learned: every one, or only the last."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens; also the length of a packed sequence."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a row longer than ``max_length``. Text for continued pre-training is split, never cut."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What happens to a row that is empty, malformed or has nothing to learn."""
    packing: bool = False
    """Put several rows in one sequence of ``max_length`` tokens; rows never see each other."""
    shuffle: bool = True
    """Shuffle the rows every epoch, by seed."""
    streaming: bool = False
    """Tokenize on the fly instead of up front, for data larger than the disk cache; needs ``train.max_steps``."""
    cache_dir: str = ".llmkit/tokens"
    """Folder of the token cache that ranks share and later runs reuse."""
    guard: GuardSettings | None = None
    """Checks for personal data, duplicates, leaked test data, quality and licences; ``{}`` takes its defaults."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.train == []:
            yield Conflict("train", "names no source")
        if self.eval == []:
            yield Conflict("eval", "names no source", "remove the line to train without evaluation")
        if self.streaming and isinstance(self.eval, EvalSplitSettings):
            hint = "name a source of its own in `data.eval`, or set `data.streaming: false`"
            yield Conflict("eval", "a share of a stream cannot be held out", hint, ("streaming",))
        if self.streaming and self.guard is not None:
            for found in self.guard.stream_conflicts():
                yield found._replace(key=f"guard.{found.key}", also=("streaming",))
        yield from self._column_conflicts("columns", self.columns, self.format)
        for key, source in self.sources():
            if isinstance(source, SourceSettings) and source.columns:
                yield from self._column_conflicts(f"{key}.columns", source.columns, source.format or self.format)

    def _column_conflicts(self, key: str, columns: dict[str, str], format_name: Format) -> Iterator[Conflict]:
        fields = COLUMN_FIELDS.get(format_name) or tuple(
            dict.fromkeys(f for named in COLUMN_FIELDS.values() for f in named)
        )
        for field in columns:
            if field not in fields:
                of = "a format" if format_name == "auto" else f"the format {format_name}"
                hint = "columns are written `{field of the format: your column}`"
                message = f"is not a field of {of}; its fields are {', '.join(fields)}"
                yield Conflict(f"{key}.{field}", message, hint, ("format",))

    def sources(self) -> Iterator[tuple[str, str | SourceSettings]]:
        """Every source with its key, e.g. ``("train.0", "a.jsonl")``."""
        against = self.guard.leaks.against if self.guard and self.guard.leaks else None
        for key, named in (("train", self.train), ("eval", self.eval), ("guard.leaks.against", against)):
            if isinstance(named, list):
                yield from ((f"{key}.{i}", source) for i, source in enumerate(named))
            elif named is not None and not isinstance(named, EvalSplitSettings):
                yield key, named
