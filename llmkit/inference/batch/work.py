"""What a stage does to rows, as the batch layer sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

    from llmkit.inference.batch.settings import BatchRecipe

WORKS: dict[str, str] = {
    "embed": "llmkit.inference.embedding.work:EmbedWork",
    "label": "llmkit.labelling.work:LabelWork",
}
"""The work of each stage: a class that is made from the stage's recipe."""


@dataclass(frozen=True)
class RowError:
    """Why a row has no output. ``dropped``: a setting says to leave such rows out; it is counted, and no mistake."""

    reason: str
    dropped: bool = False


@dataclass(frozen=True)
class Computed:
    """Output of n rows. ``columns`` are arrays [n, …] or lists of n by the names of ``Work.schema``; rows in ``errors``
    (index to reason) have values that do not count; ``tokens`` went through the model."""

    columns: Mapping[str, Any]
    errors: Mapping[int, str] = field(default_factory=dict)
    tokens: int = 0


class Work(Protocol):
    """Made anew in every process, from the recipe alone. What costs memory is opened by the first ``compute``."""

    def schema(self) -> pa.Schema:
        """The columns that are added."""

    def identity(self) -> Mapping[str, Any]:
        """What decides the output beside the rows: model, digests, versions; JSON values. A job of another identity is not gone on with."""

    def key(self, row: Mapping[str, Any]) -> bytes | None:
        """Rows of equal keys have equal outputs, and are computed once. None is equal to nothing."""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """What ``compute`` needs of each row, or a RowError. On the CPU, in another process, one chunk ahead."""

    def compute(self, prepared: Sequence[Any]) -> Computed:
        """The model's part."""


def open_work(target: str, recipe: BatchRecipe) -> Work:
    """The work that ``target`` (``module:class``, see ``WORKS``) names."""
    module, _, name = target.partition(":")
    made: Work = getattr(import_module(module), name)(recipe)
    return made
