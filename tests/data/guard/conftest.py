"""Rows for the guard's tests, and a shorthand to examine them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkit.data.guard.examine import Verdict, examine
from llmkit.data.settings import DataSettings

Row = dict[str, Any]


class Words:
    """Made-up words of one seed: texts that share nothing by chance."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self._words = ["".join(self._random.choices(letters, k=self._random.randint(4, 9))) for _ in range(4_000)]

    def __call__(self, count: int) -> str:
        return " ".join(self._random.choices(self._words, k=count))

    def row(self) -> Row:
        return {"prompt": self(20), "completion": self(30)}

    def rows(self, count: int) -> list[Row]:
        return [self.row() for _ in range(count)]


@pytest.fixture
def words() -> Words:
    return Words()


Examine = Callable[..., Verdict]


@pytest.fixture
def check(tmp_path: Path, progress: Any) -> Examine:
    """Examine training rows (against test rows) with ``guard`` settings; files land in ``tmp_path / "out"``."""

    def run(train: list[Row], test: list[Row] | None = None, guard: Row | None = None, **data: Any) -> Verdict:
        for name, rows in (("train", train), ("test", test or [])):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        named = {"eval": str(tmp_path / "test.jsonl")} if test else {}
        settings = DataSettings.model_validate(
            {"train": str(tmp_path / "train.jsonl"), **named, "guard": guard or {}, **data}
        )
        assert settings.guard is not None
        return examine(settings, settings.guard, tmp_path / "work", tmp_path / "out", progress)

    return run


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[str], list[int]]:
    """Line numbers of the training rows that a check named, from guard_rows.jsonl."""

    def lines(check_name: str) -> list[int]:
        found = [json.loads(line) for line in (tmp_path / "out" / "guard_rows.jsonl").read_text().splitlines()]
        return sorted(int(row["row"].rsplit(":", 1)[1]) for row in found if row["check"] == check_name)

    return lines
