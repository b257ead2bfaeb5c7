"""What flows through data preparation: a raw row becomes a sample, a sample becomes tokens, or either is a bad row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be learned from; ``row_id`` is ``file:line`` (or ``file:row`` in binary files)."""

    row_id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.row_id}: {self.reason}"


@dataclass(frozen=True, slots=True)
class LeftOut(BadRow):
    """A row that could be learned from, but that ``data.guard`` leaves out."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its file has it: column name to value."""

    row_id: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in Hugging Face's chat form, ``content`` always a string, tool arguments always a mapping.

    Assistant messages before index ``learn_from`` belong to the prompt and are never learned.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    learn_from: int = 0
    row_id: str = ""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and its answer; with a chat template it is rendered as a user and an assistant turn."""

    prompt: str
    completion: str
    system: str | None = None
    row_id: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A document for (continued) pre-training, every token learned."""

    text: str
    row_id: str = ""


Sample = Conversation | PromptCompletion | Text


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row in tokens, int32.

    Causal models: ``labels`` has the shape of ``input_ids`` and is aligned with it (not shifted), -100 where nothing is
    learned. Sequence-to-sequence models: ``labels`` has its own length.
    ``splittable`` marks a document, which may be split but never cut. ``drift`` marks a conversation whose earlier
    turns would get other tokens if the whole text were encoded at once.
    """

    row_id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    splittable: bool = False
    drift: bool = False
