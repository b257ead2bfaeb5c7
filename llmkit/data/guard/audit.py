"""What was found, in numbers. An audit holds no text of any row, so it can be kept, shared and tracked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.data.guard.kinds import Action, Finding, Kind


@dataclass
class SourceCounts:
    """Of one source: rows seen, rows with anything found, findings and rows by kind."""

    rows: int = 0
    rows_found: int = 0
    findings: Counter[Kind] = field(default_factory=Counter)
    rows_by_kind: Counter[Kind] = field(default_factory=Counter)

    def add(self, kinds: list[Kind]) -> None:
        self.rows += 1
        self.rows_found += bool(kinds)
        self.findings.update(kinds)
        self.rows_by_kind.update(set(kinds))

    def merge(self, other: SourceCounts) -> None:
        self.rows += other.rows
        self.rows_found += other.rows_found
        self.findings.update(other.findings)
        self.rows_by_kind.update(other.rows_by_kind)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "rows_found": self.rows_found,
            "findings": dict(sorted(self.findings.items())),
            "rows_by_kind": dict(sorted(self.rows_by_kind.items())),
        }


@dataclass
class Audit:
    """Counts of findings by kind and source. Memory: a few numbers a source, however many rows there are.

    ``kinds`` are those looked for, so that a zero means "looked and found none".
    """

    action: Action
    kinds: tuple[Kind, ...]
    sources: dict[str, SourceCounts] = field(default_factory=dict)

    def add(self, source: str, findings: Iterable[Finding]) -> None:
        """Count one row: everything found in all of its fields. ``source`` is written to the audit as it is."""
        self.sources.setdefault(source, SourceCounts()).add([finding.kind for finding in findings])

    def merge(self, other: Audit) -> None:
        """Add the counts of another process's audit. Raises ValueError when it looked for other things."""
        if (self.action, set(self.kinds)) != (other.action, set(other.kinds)):
            raise ValueError("audits of different settings cannot be added up")
        for source, counts in other.sources.items():
            self.sources.setdefault(source, SourceCounts()).merge(counts)

    @property
    def total(self) -> SourceCounts:
        """All sources together."""
        total = SourceCounts()
        for counts in self.sources.values():
            total.merge(counts)
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and names; :meth:`from_json` reads it back."""
        return {
            "action": self.action,
            "kinds": list(self.kinds),
            "total": self.total.to_json(),
            "sources": {source: counts.to_json() for source, counts in sorted(self.sources.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Audit:
        """The inverse of :meth:`to_json`. Raises KeyError when a field is not there."""
        audit = cls(data["action"], tuple(data["kinds"]))
        for source, counts in data["sources"].items():
            audit.sources[source] = SourceCounts(
                counts["rows"], counts["rows_found"], Counter(counts["findings"]), Counter(counts["rows_by_kind"])
            )
        return audit

    def write(self, path: Path) -> None:
        """Write the audit file. Raises OSError."""
        path.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
