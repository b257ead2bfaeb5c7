"""The last thing a stage's user reads: numbers before and after, sample answers, where it all is, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmkit.context import Result
from llmkit.progress import duration, number

ANSWER_WIDTH = 300

PAIRS = (
    ("_before", "_after"),
    ("_start", "_end"),
    ("_first", "_last"),
    ("_initial", "_final"),
)
"""Endings (also ``x/before``) under which a stage reports the same number from before and after its work."""


def summary(result: Result) -> str:
    """The whole text, without colours."""
    parts = [f"{result.stage} {result.name}: {result.status}", _metrics(result.metrics), _samples(result.samples)]
    return "\n\n".join(p for p in [*parts, _next(result)] if p)


def _metrics(metrics: Mapping[str, float]) -> str:
    pairs = list(paired(metrics))
    used = {name for _, before, after in pairs for name in (before, after)}
    lines = [f"  {label}: {number(metrics[b])} → {number(metrics[a])}" for label, b, a in pairs]
    lines += [f"  {name}: {_value(name, value)}" for name, value in metrics.items() if name not in used]
    return "\n".join(lines)


def paired(metrics: Mapping[str, float]) -> Sequence[tuple[str, str, str]]:
    """(label, name before, name after) of what was measured twice."""
    found = []
    for name in metrics:
        for before, after in (*PAIRS, *((b.replace("_", "/"), a.replace("_", "/")) for b, a in PAIRS)):
            other = name.removesuffix(before) + after
            if name.endswith(before) and other in metrics:
                found.append((name.removesuffix(before), name, other))
    return found


def _value(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GB" if value >= 2**30 else f"{value / 2**20:.0f} MB"
    return duration(value) if name.endswith("_seconds") and value >= 60 else number(value)


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    blocks = []
    for sample in samples:
        rows = [(key, sample[key]) for key in ("prompt", "reference", "before", "after") if sample.get(key)]
        blocks.append("\n".join(f"  {key:>9}: {shorten(text)}" for key, text in rows))
    return "\n\n".join(b for b in blocks if b)


def shorten(text: str) -> str:
    """One line of at most ANSWER_WIDTH characters; what was cut is said, the whole is in result.json."""
    line = " ".join(text.split())
    return line if len(line) <= ANSWER_WIDTH else f"{line[:ANSWER_WIDTH]} … ({len(line):,} characters)"


def _next(result: Result) -> str:
    folder = result.uri or _short(result.output_dir)
    lines = [f"  run folder:  {folder}"]
    if result.uri is not None:
        lines.append(f"  worked in:   {_short(result.output_dir)}")
    if {"model", "adapter"} & set(result.artifacts) or any(
        (result.output_dir / n).is_dir() for n in ("model", "adapter")
    ):
        lines.append(f"  try it:      llmkit chat {shlex.quote(folder)}")
    if result.run_id is not None:
        from llmkit.tracking.links import ui_command

        lines.append(f"  MLflow:      {ui_command(_tracking_uri(result.output_dir))}")
    return "\n".join(lines)


def _tracking_uri(folder: Path) -> str | None:
    import yaml

    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except OSError:
        return None
    uri = (recipe.get("tracking") or {}).get("uri")
    return uri if isinstance(uri, str) else None


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
