"""The audit file: counts by kind and source, small whatever the data's size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmkit.data.guard.audit import Audit
from llmkit.data.guard.kinds import Finding
from llmkit.data.guard.privacy import PrivacyFilter


def test_rows_and_findings_are_counted_apart(tmp_path: Path) -> None:
    audit = Audit("redact", ("email", "phone"))
    audit.add("a.jsonl", [Finding("email", 0, 5), Finding("email", 8, 12), Finding("phone", 20, 30)])
    audit.add("a.jsonl", [])
    audit.add("b.jsonl", [Finding("phone", 0, 9)])
    audit.write(tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == {
        "action": "redact",
        "kinds": ["email", "phone"],
        "total": {"rows": 3, "rows_found": 2, "findings": {"email": 2, "phone": 2}, "rows_by_kind": {"email": 1, "phone": 2}},
        "sources": {
            "a.jsonl": {"rows": 2, "rows_found": 1, "findings": {"email": 2, "phone": 1}, "rows_by_kind": {"email": 1, "phone": 1}},
            "b.jsonl": {"rows": 1, "rows_found": 1, "findings": {"phone": 1}, "rows_by_kind": {"phone": 1}},
        },
    }  # fmt: skip


def test_audits_of_different_settings_are_not_added_up() -> None:
    with pytest.raises(ValueError, match="different settings"):
        Audit("redact", ("email",)).merge(Audit("drop", ("email",)))


def test_memory_does_not_grow_with_the_rows() -> None:
    """A stream of rows leaves nothing behind but counts."""
    guard = PrivacyFilter(action="redact")
    audit = guard.audit()

    def size() -> int:
        return len(json.dumps(audit.to_json())) + sum(map(sys.getsizeof, vars(guard).values()))

    def stream(rows: int) -> None:
        for at in range(rows):
            audit.add("stream", guard.apply(f"행 {at}: kim{at}@corp.co.kr 010-2345-{at % 10000:04d}", at).findings)

    stream(100)
    before = size()
    stream(2000)
    assert size() - before < 20
    assert audit.total.findings == {"email": 2100, "phone": 2100}
