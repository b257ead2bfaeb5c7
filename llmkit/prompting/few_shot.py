"""Demonstrations for a prompt: fixed ones, by chance, or those most like the case.

A demonstration that asks what the case asks is never shown, whatever way of choosing: it would hold the answer.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.data.readers import read_file
from llmkit.data.rows import BadRow
from llmkit.errors import DataError
from llmkit.prompting.settings import FewShot

Example = Mapping[str, Any]
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""Texts [n] to vectors [n][dimension], e.g. ``lambda texts: model.encode(list(texts))`` of sentence-transformers."""

_GRAMS = (1, 2, 3, 4)


class Demonstrations:
    """Chooses demonstrations for cases by the rule of a template.

    ``folder`` is where a relative ``examples`` file is looked for (the template's), ``variables`` the names that are
    compared where ``settings.key`` is None. ``embed`` compares by meaning; without it texts are compared by the letters
    that they share (TF-IDF over character n-grams), which needs no model and no word boundaries.

    Raises DataError for examples that cannot be read or lack ``key`` or ``category``.
    """

    def __init__(
        self,
        settings: FewShot,
        *,
        folder: str | Path = ".",
        variables: Sequence[str] = (),
        embed: Embed | None = None,
    ) -> None:
        self.settings = settings
        self.examples = _read(settings.examples, Path(folder))
        self._fields = [settings.key] if settings.key else list(variables)
        self._check()
        self._texts = [self._text(example) for example in self.examples]
        self._known = [normalise(text) for text in self._texts]
        self._index: _Lexical | _Dense | None = None
        if settings.choose in ("nearest", "same"):
            self._index = _Dense(self._texts, embed) if embed else _Lexical(self._texts)

    def pick(self, case: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The demonstrations of one case, in the order in which they are shown (the most alike last)."""
        return self.pick_all([case])[0]

    def pick_all(self, cases: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """Those of many cases; texts are embedded in one call."""
        texts = [self._text(case) for case in cases]
        scores = self._index.scores(texts) if self._index else [None] * len(cases)
        return [self._one(*three) for three in zip(cases, texts, scores, strict=True)]

    def _one(self, case: Mapping[str, Any], text: str, scores: Sequence[float] | None) -> list[dict[str, Any]]:
        same = normalise(text)
        left = [i for i in range(len(self.examples)) if not self._is_case(i, same, case)]
        rule = self.settings
        if rule.choose == "same" and rule.category:
            left = [i for i in left if self.examples[i][rule.category] == case.get(rule.category)]
        if rule.choose == "random":
            chosen = random.Random(f"{rule.seed} {same}").sample(left, min(rule.count, len(left)))
        elif scores is not None:
            chosen = sorted(left, key=lambda i: (-scores[i], i))[: rule.count][::-1]
        else:
            chosen = left[: rule.count]
        return [dict(self.examples[i]) for i in chosen]

    def _is_case(self, index: int, same: str, case: Mapping[str, Any]) -> bool:
        return (bool(same) and self._known[index] == same) or self.examples[index] == case

    def _text(self, row: Mapping[str, Any]) -> str:
        shared = [name for name in self._fields if name in row and all(name in example for example in self.examples)]
        return "\n".join(str(row[name]) for name in shared if row[name] is not None)

    def _check(self) -> None:
        for field in filter(None, (self.settings.key, self.settings.category)):
            for number, example in enumerate(self.examples, 1):
                if field not in example:
                    has = ", ".join(map(str, list(example)[:8]))
                    raise DataError(f"few_shot: demonstration {number} has no {field!r} (it has: {has})")
        if self.settings.choose in ("nearest", "same") and not self._shared_fields():
            raise DataError(
                "few_shot: demonstrations and variables have no field in common, so nothing can be compared; "
                "give the demonstrations the template's variables, or name the field in `key`"
            )

    def _shared_fields(self) -> list[str]:
        return [name for name in self._fields if all(name in example for example in self.examples)]


def normalise(text: str) -> str:
    """Text as it is compared: width, case and blanks do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _read(examples: str | list[dict[str, Any]], folder: Path) -> list[Example]:
    if isinstance(examples, list):
        return list(examples)
    file = Path(examples)
    file = file if file.is_absolute() else folder / file
    rows: list[Example] = []
    for row in read_file(str(file)):
        if isinstance(row, BadRow):
            raise DataError(f"few_shot: {row}")
        rows.append(row.data)
    if not rows:
        raise DataError(f"few_shot: {file} holds no demonstrations")
    return rows


class _Lexical:
    """Cosine of TF-IDF vectors over character n-grams, by an inverted index; idf = ln((1 + n) / (1 + df)) + 1."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [_grams(text) for text in texts]
        documents = Counter(gram for count in counts for gram in count)
        self._idf = {gram: math.log((1 + len(texts)) / (1 + df)) + 1 for gram, df in documents.items()}
        self._size = len(texts)
        self._postings: dict[str, list[tuple[int, float]]] = {}
        for index, count in enumerate(counts):
            for gram, weight in self._weights(count).items():
                self._postings.setdefault(gram, []).append((index, weight))

    def _weights(self, count: Counter[str]) -> dict[str, float]:
        raw = {gram: (1 + math.log(n)) * self._idf[gram] for gram, n in count.items() if gram in self._idf}
        norm = math.sqrt(sum(weight * weight for weight in raw.values())) or 1.0
        return {gram: weight / norm for gram, weight in raw.items()}

    def scores(self, texts: Sequence[str]) -> list[list[float]]:
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> list[float]:
        sums = [0.0] * self._size
        for gram, weight in self._weights(_grams(text)).items():
            for index, other in self._postings[gram]:
                sums[index] += weight * other
        return sums


def _grams(text: str) -> Counter[str]:
    padded = f" {normalise(text)} "
    return Counter(
        padded[at : at + n] for n in _GRAMS for at in range(len(padded) - n + 1) if padded[at : at + n] != " "
    )


class _Dense:
    """Cosine of vectors from an embedding function."""

    def __init__(self, texts: Sequence[str], embed: Embed) -> None:
        self._embed = embed
        self._vectors = [_unit(vector) for vector in embed(texts)]

    def scores(self, texts: Sequence[str]) -> list[list[float]]:
        made = [_unit(vector) for vector in self._embed(texts)]
        return [[sum(map(_times, vector, other)) for other in self._vectors] for vector in made]


def _times(a: float, b: float) -> float:
    return a * b


def _unit(vector: Iterable[float]) -> list[float]:
    values = [float(value) for value in vector]
    norm = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / norm for value in values]
