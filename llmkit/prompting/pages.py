"""A prompt test for people: the table template × model on a terminal, a Markdown report, an HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.prompting.outcomes import Comparison, Outcome, Share, named_scores, share, shares
from llmkit.prompting.report import StaticReport
from llmkit.prompting.static import VersionDiff

PAGE = Path(__file__).parent / "report.html.jinja"
SHOWN_FAILURES = 10
OUTPUT_WIDTH = 160


@dataclass(frozen=True)
class Findings:
    """Everything that a report tells."""

    name: str
    outcomes: Sequence[Outcome] = ()
    statics: Sequence[StaticReport] = ()
    versions: Sequence[VersionDiff] = ()
    comparison: Comparison | None = None
    shortfalls: Sequence[str] = ()
    notes: Sequence[str] = ()
    names: tuple[Sequence[str], Sequence[str]] = field(default=((), ()))
    """Titles of the templates, labels of the models, in the recipe's order."""

    @property
    def templates(self) -> list[str]:
        return list(self.names[0])

    @property
    def models(self) -> list[str]:
        return list(self.names[1])

    def cell(self, template: str, model: str) -> Share:
        return share(one for one in self.outcomes if (one.template, one.model) == (template, model))

    def static_of(self, template: str, model: str) -> StaticReport | None:
        return next((one for one in self.statics if (one.template, one.model) == (template, model)), None)

    @property
    def failed(self) -> list[Outcome]:
        return [one for one in self.outcomes if not one.passed]


def cut(text: str, most: int = OUTPUT_WIDTH) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


def rows(found: Findings) -> list[list[str]]:
    """The table template × model, heading first, with sums at its edges."""
    by_template = shares(found.outcomes, lambda one: one.template)
    by_model = shares(found.outcomes, lambda one: one.model)
    table = [["template", *found.models, *(["all"] if len(found.models) > 1 else [])]]
    for template in found.templates:
        cells = [_cell(found, template, model) for model in found.models]
        both = [_share(by_template.get(template))] if len(found.models) > 1 else []
        table.append([template, *cells, *both])
    if len(found.templates) > 1 and found.outcomes:
        every = [str(share(found.outcomes))] if len(found.models) > 1 else []
        table.append(["all", *(_share(by_model.get(model)) for model in found.models), *every])
    return table


def _share(one: Share | None) -> str:
    return str(one) if one is not None and one.total else "-"


def _cell(found: Findings, template: str, model: str) -> str:
    tested, static = found.cell(template, model), found.static_of(template, model)
    words = [str(tested)] if tested.total else []
    if static is not None:
        errors, warnings = len(static.errors), len(static.warnings)
        counts = [f"{errors} error{'s' * (errors != 1)}"] * bool(errors)
        counts += [f"{warnings} warning{'s' * (warnings != 1)}"] * bool(warnings)
        words.append(f"static: {', '.join(counts)}" if counts else "static: ok")
    return "; ".join(words) or "-"


def terminal(found: Findings) -> str:
    """What is printed: the table, what static checks found, what changed, the first failures, thresholds not met."""
    parts = [_aligned(rows(found)), *_static_lines(found), *(diff.text(1) for diff in found.versions)]
    if found.comparison is not None:
        parts.append("\n".join(_changes(found.comparison)))
    failed = found.failed
    if failed:
        lines = [f"  {one.template} × {one.model}, {one.case}: {cut(one.why, 300)}" for one in failed[:SHOWN_FAILURES]]
        more = [f"  and {len(failed) - SHOWN_FAILURES} more, see report.md"] if len(failed) > SHOWN_FAILURES else []
        parts.append("\n".join([f"{len(failed)} did not pass:", *lines, *more]))
    parts += [f"below a threshold: {line}" for line in found.shortfalls]
    return "\n\n".join(part for part in [*parts, *found.notes] if part)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns under each other; Han, kana and Hangul are two cells wide."""
    from rich.cells import cell_len

    widths = [max(cell_len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _static_lines(found: Findings) -> Iterator[str]:
    for report in found.statics:
        issues = [*report.errors, *report.warnings]
        if issues:
            lines = [
                f"  {issue.severity}: {issue.check}: {issue.message}" + _cases(issue.cases, issue.case)
                for issue in issues
            ]
            yield "\n".join([f"static checks of {report.template} with {report.model}:", *lines])


def _cases(count: int, first: str | None) -> str:
    return f" ({count} cases, first {first})" if count > 1 else f" ({first})" if first else ""


def _changes(comparison: Comparison) -> Iterator[str]:
    yield comparison.headline
    for word, outcomes in (("broke", comparison.broke), ("fixed", comparison.fixed)):
        for one in outcomes[:SHOWN_FAILURES]:
            yield f"  {word}: {one.template} × {one.model}, {one.case}" + (f": {cut(one.why)}" if one.why else "")
        if len(outcomes) > SHOWN_FAILURES:
            yield f"  and {len(outcomes) - SHOWN_FAILURES} more {word}"


# Markdown


def markdown(found: Findings) -> str:
    """The report as Markdown, e.g. for a comment on a pull request."""
    parts = [f"# Prompt test: {_plain(found.name)}", _headline(found), _markdown_table(rows(found))]
    parts += [f"**Below a threshold:** {_plain(line)}" for line in found.shortfalls]
    parts += [f"> {_plain(note)}" for note in found.notes]
    static = [line for report in found.statics for line in _static_markdown(report)]
    if static:
        parts.append("\n".join(["## Static checks", "", *static]))
    if found.versions:
        parts.append("\n\n".join(["## Versions", *(_fenced(diff.text(), "diff") for diff in found.versions)]))
    if found.comparison is not None:
        lines = list(_changes(found.comparison))
        parts.append(
            "\n".join(["## Changes", "", _plain(lines[0]), "", *(f"- {_plain(line.strip())}" for line in lines[1:])])
        )
    scores = named_scores(found.outcomes)
    if scores:
        lines = [f"| {_plain(name)} | {score:.3f} |" for name, score in scores.items()]
        parts.append("\n".join(["## Named scores", "", "| metric | mean score |", "| --- | --- |", *lines]))
    if found.failed:
        parts.append("\n\n".join(["## What did not pass", *map(_failure, found.failed)]))
    return "\n\n".join(parts).rstrip() + "\n"


def _headline(found: Findings) -> str:
    if not found.outcomes:
        return "Static checks only: nothing was generated."
    errors = sum(one.error is not None for one in found.outcomes)
    return f"**{share(found.outcomes)}** passed" + (f", {errors} without an answer" if errors else "") + "."


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    line = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        line = line.replace(sign, f"\\{sign}")
    return line


def _fenced(text: str, language: str = "text") -> str:
    """Code that no backtick in it can close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def _static_markdown(report: StaticReport) -> Iterator[str]:
    for issue in report.issues:
        place = f"{_plain(report.template)} × {_plain(report.model)}"
        message = f"{_plain(issue.message)}{_plain(_cases(issue.cases, issue.case))}"
        yield f"- **{issue.severity}** `{issue.check}` {place}: {message}"


def _failure(one: Outcome) -> str:
    expected = [f"expected:\n\n{_fenced(one.expected)}"] if one.expected is not None else []
    answer = [f"answer:\n\n{_fenced(one.output)}"] if one.error is None else []
    head = f"### {_plain(one.template)} × {_plain(one.model)}, {_plain(one.case)}"
    return "\n\n".join(
        [head, *([_plain(one.description)] if one.description else []), _plain(one.why), *expected, *answer]
    )


# HTML


def html(found: Findings) -> str:
    """One page without anything fetched from elsewhere."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["prompt"] = prompt_text
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False, indent=1, default=str)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        found=found, table=rows(found), headline=_headline(found).replace("**", ""), scores=named_scores(found.outcomes),
        static=[report for report in found.statics if report.issues],
    )  # fmt: skip


def prompt_text(prompt: Any) -> str:
    """A prompt to be read: messages under their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message['role']}]\n{message.get('content') or ''}" for message in prompt)


def table(found: Findings) -> dict[str, list[Any]]:
    """Outcomes as MLflow's tables have them: columns and rows of plain values."""
    columns = [
        "template",
        "model",
        "case",
        "passed",
        "score",
        "prompt",
        "output",
        "expected",
        "why",
        "tokens",
        "seconds",
    ]
    data = [
        [one.template, one.model, one.case, one.passed, one.score, prompt_text(one.prompt), one.output, one.expected,
         one.why, one.tokens, one.seconds]
        for one in found.outcomes
    ]  # fmt: skip
    return {"columns": columns, "data": data}
