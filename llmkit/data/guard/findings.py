"""What the checks found: every row on a line of ``guard_rows.jsonl``, counts and first examples in ``guard_report.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.settings import RowAction

REPORT = "guard_report.json"
ROWS = "guard_rows.jsonl"
_EXAMPLES = 20


class Findings:
    """Collects findings about training rows, by their number in the ledger. Memory: examples, and the numbers of the rows that are dropped."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.dropped_by: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._drops: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()

    def add(self, check: str, action: str, row_id: str, reason: str, row: int | None = None, **more: Any) -> None:
        """A row that a check names. ``row`` is its number; without one (a held-out row) only the report knows it."""
        self.counts[check] += 1
        found = {"row": row_id, "check": check, "action": action, "reason": reason, **more}
        self._stream.write(json.dumps(found, ensure_ascii=False) + "\n")
        examples = self.examples.setdefault(check, [])
        if len(examples) < _EXAMPLES:
            examples.append({key: value for key, value in found.items() if key not in ("check", "action")})
        if action == "error":
            self.refused[check] += 1
        if action == "drop" and row is not None and row not in self._drops:
            self.dropped_by[check] += 1
            self._drops.add(row)

    def dropped(self, rows: int) -> NDArray[np.bool_]:
        """Which of so many rows were named by a check that drops, so far."""
        mask = np.zeros(rows, bool)
        mask[list(self._drops)] = True
        return mask

    def summary(self, check: str, action: RowAction | str) -> dict[str, Any]:
        """Count and first examples of a check, for the report."""
        return {"action": action, "rows": self.counts[check], "first": self.examples.get(check, [])}


def summary_lines(report: Mapping[str, Any] | None) -> list[str]:
    """A guard report in a few lines for the terminal; only what was found, and one line where nothing was."""
    if report is None:
        return []
    lines = [f"guard: {name}: {text}" for name, text in _lines(report)]
    dropped = report["dropped"]["rows"]
    if dropped:
        by = ", ".join(f"{count:,} {check.replace('_', ' ')}" for check, count in report["dropped"]["by"].items())
        lines.append(f"guard: left out {dropped:,} of {report['rows']:,} rows ({by}); {ROWS} lists them")
    return lines or [f"guard: {report['rows']:,} rows checked, nothing found"]


def _lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in found_by_check(report).items():
        if found["rows"]:
            first = f" (first: {found['first'][0]['row']}: {found['first'][0]['reason']})" if found["first"] else ""
            yield name.replace("_", " "), f"{found['rows']:,} rows, {found['action']}{first}"


def found_by_check(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """``action``, ``rows`` and ``first`` of every check of a guard report, by the check's name."""
    found: dict[str, Mapping[str, Any]] = {}
    if "unusable" in report:
        found["unusable"] = report["unusable"]
    if "privacy" in report:
        found["personal_data"] = report["privacy"]
    if "leaks" in report:
        found["leaks"] = report["leaks"]
    for kind in ("exact", "near"):
        if "duplicates" in report:
            found[f"{kind}_duplicates"] = report["duplicates"][kind]
    if "contradictions" in report:
        found["contradictions"] = report["contradictions"]
    quality = report.get("quality", {})
    found |= quality.get("checks", {})
    if "perplexity" in quality:
        found["perplexity"] = quality["perplexity"]
    return found


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Numbers for the tracker: rows, and rows by check."""
    found = {f"guard_{name}": float(check["rows"]) for name, check in found_by_check(report).items()}
    return {"guard_rows": float(report["rows"]), "guard_dropped": float(report["dropped"]["rows"]), **found}
