"""The labels of a recipe: their names, what the model writes for each, and which of them an answer is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.errors import DataError
from llmkit.labelling.settings import Labels, LabelSettings


@dataclass(frozen=True)
class LabelSet:
    """``names`` are what the output has, ``texts`` what the model writes, ``descriptions`` what templates may show."""

    names: Sequence[str]
    texts: Sequence[str]
    descriptions: Mapping[str, str]

    @classmethod
    def read(cls, given: Labels) -> LabelSet:
        """The labels of a recipe. Raises DataError for a file that cannot be read and for labels that are no choice."""
        given = _from_file(given) if isinstance(given, str) else given
        entries = {name: LabelSettings() for name in given} if isinstance(given, list) else dict(given)
        if isinstance(given, list) and len(entries) < len(given):
            twice = next(name for name in given if given.count(name) > 1)
            raise DataError(f"labels: {twice!r} is there twice.")
        made = {name: LabelSettings(text=e) if isinstance(e, str) else e for name, e in entries.items()}
        texts = [e.text or name for name, e in made.items()]
        if len(texts) < 2:
            raise DataError("labels: there is nothing to choose from; name at least two.")
        if doubled := next((text for text in texts if texts.count(text) > 1), None):
            raise DataError(
                f"labels: two labels have the same text {doubled!r}, so that answers cannot tell them apart."
            )
        return cls(list(made), texts, {name: e.description for name, e in made.items() if e.description})

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def _by_text(self) -> dict[str, int]:
        return {_plain(name): i for i, name in enumerate(self.names)} | {_plain(t): i for i, t in enumerate(self.texts)}

    def find(self, name: Any) -> int:
        """Index of a label by its name or its text; -1 where there is no such label."""
        return self._index.get(str(name), self._by_text.get(_plain(str(name)), -1))

    def read_answer(self, answer: str) -> int:
        """Index of the label that an answer is, letter case, quotes and a full stop aside; -1 for none."""
        return self._by_text.get(_plain(answer), -1)

    def variables(self) -> dict[str, Any]:
        """What templates can read: ``labels``, the texts in order, and ``label_descriptions``, by text."""
        pairs = zip(self.names, self.texts, strict=True)
        described = {text: self.descriptions[name] for name, text in pairs if name in self.descriptions}
        return {"labels": list(self.texts), "label_descriptions": described}


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip("\"'`“”‘’「」").rstrip(".。!").strip().casefold()


def _from_file(path: str) -> list[str] | dict[str, str | LabelSettings]:
    """A ``.json`` file with a list or mapping, else a text file with a label in each line."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
        found = json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"labels: {path} cannot be read: {why}") from None
    if isinstance(found, list):
        wrong = next((one for one in found if not isinstance(one, str)), None)
        if wrong is not None:
            raise DataError(f"labels: {path} holds {wrong!r}, which is no text.")
        return [str(label) for label in found if label]
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise DataError(f"labels: {path} must hold a list of labels, or a mapping of names to texts.")
    return dict(found)
