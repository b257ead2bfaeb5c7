"""What data preparation found: ``data_report.json``, the histogram of lengths, and the messages of its errors."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.data.rows import BadRow
from llmkit.data.settings import DataSettings
from llmkit.data.store import TokenStore

_PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)


@dataclass
class SourceReport:
    """Counts of one source. ``rows_read`` counts all rows of its files, bad ones included."""

    key: str
    path: str
    files: int
    weight: float
    format: str = ""
    format_reason: str = ""
    rows_read: int = 0
    rows_used: int = 0
    rows_not_drawn: int = 0
    rows_guarded: int = 0
    documents_split: int = 0
    drifted: int = 0
    first_drifted: str = ""
    bad: list[BadRow] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)

    def to_dict(self, action: str) -> dict[str, Any]:
        """For the report. ``action`` is ``data.on_too_long``."""
        reasons: dict[str, list[str]] = {}
        for row in self.bad:
            reasons.setdefault(row.reason, []).append(row.row_id)
        return {
            "key": self.key,
            "path": self.path,
            "files": self.files,
            "weight": self.weight,
            "format": self.format,
            "format_reason": self.format_reason,
            "rows_read": self.rows_read,
            "rows_used": self.rows_used,
            "rows_not_drawn": self.rows_not_drawn,
            "rows_left_out_by_guard": self.rows_guarded,
            "rows_bad": len(self.bad),
            "rows_too_long": len(self.too_long),
            "rows_dropped": len(self.bad) + (len(self.too_long) if action == "drop" else 0),
            "rows_truncated": len(self.too_long) if action == "truncate" else 0,
            "documents_split": self.documents_split,
            "rows_with_other_tokens_at_a_turn": self.drifted,
            "bad": [
                {"reason": reason, "count": len(rows), "first": rows[:3], "rows": rows}
                for reason, rows in sorted(reasons.items(), key=lambda item: -len(item[1]))
            ],
            "too_long": [{"row": row, "tokens": tokens} for row, tokens in self.too_long],
        }


def together(parts: Sequence[Sequence[SourceReport]]) -> list[SourceReport]:
    """Reports of the same sources by several processes, each of its own rows, as one: counts and lists add up."""
    counts = ("rows_read", "rows_used", "rows_not_drawn", "documents_split", "drifted", "bad", "too_long")
    first = ("format", "format_reason", "first_drifted")
    made = []
    for same in zip(*parts, strict=True):
        values: dict[str, Any] = {name: getattr(same[0], name) for name in counts}
        for other in same[1:]:
            values = {name: value + getattr(other, name) for name, value in values.items()}
        values |= {name: next(filter(None, (getattr(one, name) for one in same)), "") for name in first}
        made.append(replace(same[0], **values))
    return made


def added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mappings of counts, however deep, added up; what is no number is taken from the first that has it."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                found[key] = added([found.get(key, {}), value])
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found[key] = found.get(key, 0) + value
            else:
                found.setdefault(key, value)
    return found


def problems(sources: Sequence[SourceReport], settings: DataSettings) -> list[str]:
    """What the recipe does not allow, each a paragraph of the one error message."""
    found = []
    read = sum(source.rows_read for source in sources)
    bad = [row for source in sources for row in source.bad]
    if bad and settings.on_bad_row == "error":
        found.append(_bad_message(bad, read))
    long = [row for source in sources for row in source.too_long]
    if long and settings.on_too_long == "error":
        found.append(_long_message(long, read, settings.max_length))
    if not found and read and not sum(source.rows_used for source in sources):
        found.append(_nothing_left(bad, long, read, sum(source.rows_guarded for source in sources)))
    return found


def _bad_message(bad: Sequence[BadRow], read: int) -> str:
    reasons = Counter(row.reason for row in bad).most_common(4)
    counts = "; ".join(f"{count:,} × {reason}" for reason, count in reasons)
    first = "\n".join(f"    {row}" for row in bad[:3])
    more = f"\n  By reason: {counts}" if len(bad) > 3 else ""
    return (
        f"{len(bad):,} of {read:,} rows cannot be learned from. The first:\n{first}{more}\n"
        "  Mend them, or set data.on_bad_row: drop to leave them out."
    )


def _long_message(long: Sequence[tuple[str, int]], read: int, limit: int) -> str:
    first = ", ".join(f"{row} ({tokens:,} tokens)" for row, tokens in long[:3])
    row, tokens = max(long, key=lambda item: item[1])
    verb = "is" if len(long) == 1 else "are"
    return (
        f"{len(long):,} of {read:,} rows {verb} longer than data.max_length: {limit}. The first: {first}; "
        f"the longest: {row} ({tokens:,} tokens).\n"
        f"  data.max_length: {tokens} keeps all; data.on_too_long: drop leaves these {len(long):,} out; "
        "truncate cuts them, so that they lose the end of the answer and its stop token."
    )


def _nothing_left(bad: Sequence[BadRow], long: Sequence[tuple[str, int]], read: int, guarded: int) -> str:
    counts = Counter(row.reason for row in bad)
    if guarded:
        counts["left out by data.guard"] = guarded
    if long:
        counts["longer than data.max_length"] = len(long)
    reasons = "; ".join(f"{count:,} × {reason}" for reason, count in counts.most_common(4))
    return f"none of {read:,} rows is left to learn from: {reasons or 'none was drawn; raise the weights'}."


def lengths_summary(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Minimum, percentiles, mean and maximum of row lengths in tokens."""
    if not len(lengths):
        return {}
    marks = np.percentile(lengths, _PERCENTILES)
    named = {f"p{mark}": float(value) for mark, value in zip(_PERCENTILES, marks, strict=True)}
    return {"min": float(lengths.min()), **named, "mean": float(lengths.mean()), "max": float(lengths.max())}


def store_summary(store: TokenStore) -> dict[str, Any]:
    return {
        "rows": len(store),
        "tokens": store.tokens,
        "supervised_tokens": store.supervised,
        "lengths": lengths_summary(store.lengths),
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write beside, then rename, so that a reader never sees half a report."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def histogram(path: Path, train: NDArray[np.int64], held_out: NDArray[np.int64] | None, max_length: int) -> None:
    """Draw the lengths of rows in tokens, with ``max_length`` marked, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bins = np.histogram_bin_edges(train, bins=60)
    axes.stairs(np.histogram(train, bins)[0], bins, fill=True, label=f"train, {len(train):,} rows")
    if held_out is not None and len(held_out):
        axes.stairs(np.histogram(held_out, bins)[0], bins, fill=True, label=f"eval, {len(held_out):,} rows")
    axes.axvline(max_length, color="black", linestyle="--", label=f"max_length {max_length:,}")
    axes.set(xlabel="tokens in a row", ylabel="rows", title="Row lengths")
    axes.legend()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)
