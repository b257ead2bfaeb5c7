"""What several processes found in their rows, as one report."""

from __future__ import annotations

from llmkit.data.report import SourceReport, added, together
from llmkit.data.rows import BadRow


def test_reports_of_all_ranks_add_up() -> None:
    first = SourceReport("data.train", "a.jsonl", 1, 1.0, "messages", "because", 10, 7, bad=[BadRow("a:1", "empty")])
    second = SourceReport("data.train", "a.jsonl", 1, 1.0, rows_read=9, rows_used=8, too_long=[("a:2", 99)], drifted=1)
    second.first_drifted = "a:4"
    (one,) = together([[first], [second]])
    assert (one.rows_read, one.rows_used, one.drifted, one.first_drifted) == (19, 15, 1, "a:4")
    assert (one.format, one.format_reason, one.files, one.weight) == ("messages", "because", 1, 1.0)
    assert (one.bad, one.too_long) == ([BadRow("a:1", "empty")], [("a:2", 99)])
    assert (first.rows_read, len(first.bad)) == (10, 1)
    assert together([[first]]) == [first]


def test_counts_add_up_however_deep() -> None:
    parts = [{"a": {"n": 1, "of": {"x": 2}}, "action": "drop"}, {"a": {"n": 4, "of": {"y": 3}}, "kinds": ["email"]}]
    assert added(parts) == {"a": {"n": 5, "of": {"x": 2, "y": 3}}, "action": "drop", "kinds": ["email"]}
    assert added([{}, {}]) == {}
