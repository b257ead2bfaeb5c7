"""A guard report for people: a table for the terminal, Markdown, HTML, and the histogram of lengths."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.data.guard.findings import found_by_check

LENGTHS = "guard_lengths.png"
Report = Mapping[str, Any]
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;"
    "vertical-align:top}th{background:#f3f3f3}td.n{text-align:right}img{max-width:100%}.bad{color:#b00020;font-weight:600}"
)


def rows_of_table(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Check, rows, share of the rows, action, first example; one line for each check that was made."""
    rows = []
    for name, found in found_by_check(report).items():
        first = found["first"][0] if found["first"] else None
        example = f"{first['row']}: {first['reason']}" if first else ""
        share = f"{found['rows'] / report['rows']:.2%}" if report["rows"] else ""
        rows.append((name.replace("_", " "), f"{found['rows']:,}", share, found["action"], example))
    return rows


def text_table(report: Report) -> str:
    """The checks as aligned lines."""
    head = ("check", "rows", "share", "action", "first")
    rows = [head, *rows_of_table(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    right = (False, True, True, False)
    lines = [
        "  ".join([
            *(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row[:4], widths, right, strict=True)),
            row[4],
        ]).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join([*lines, *(f"licence of {of['name']}: {of['license']}" for of in report.get("licences", ()))])


def _sections(report: Report) -> list[tuple[str, list[str], list[Sequence[str]]]]:
    """Title, header and rows of every table of the report."""
    sections: list[tuple[str, list[str], list[Sequence[str]]]] = [
        ("Checks", ["check", "rows", "share", "action", "first"], list(rows_of_table(report)))
    ]
    if licences := report.get("licences"):
        lines = [(of["of"], of["name"], of["license"], of["said_by"]) for of in licences]
        sections.append(("Licences", ["of", "name", "license", "said by"], list(lines)))
    if kinds := report.get("privacy", {}).get("total", {}).get("findings"):
        sections.append(("Personal data, by kind", ["kind", "found"], [(k, f"{n:,}") for k, n in kinds.items()]))
    for name, found in found_by_check(report).items():
        if found["first"]:
            first = [(entry["row"], entry["reason"]) for entry in found["first"]]
            sections.append((f"First rows: {name.replace('_', ' ')}", ["row", "reason"], list(first)))
    disputed = [
        (group["question"], f"{group['rows']:,}", "; ".join(f"{a['row']}: {a['answer']}" for a in group["answers"]))
        for group in report.get("contradictions", {}).get("groups", ())
    ]
    if disputed:
        sections.append(("Contradictions", ["question", "rows", "answers"], list(disputed)))
    return sections + _quality_sections(report.get("quality", {}))


def _quality_sections(quality: Report) -> list[tuple[str, list[str], list[Sequence[str]]]]:
    sections: list[tuple[str, list[str], list[Sequence[str]]]] = []
    answers = quality.get("answers", {})
    if answers.get("commonest"):
        title = "Labels" if answers["kind"] == "labels" else "Repeated answers"
        common = [(a["answer"], f"{a['rows']:,}", f"{a['share']:.2%}") for a in answers["commonest"]]
        header = ["answer", "rows", "share"]
        sections.append((f"{title} ({answers['different']:,} different answers)", header, list(common)))
    for side, counts in quality.get("languages", {}).items():
        lines = [(language, f"{count:,}") for language, count in counts.items()]
        sections.append((f"Languages of the {side}s", ["language", "rows"], list(lines)))
    return sections


def _facts(report: Report) -> list[str]:
    dropped = report["dropped"]["rows"]
    facts = [f"{report['rows']:,} training rows, {report['test_rows']:,} test rows."]
    if dropped:
        facts.append(f"{dropped:,} rows are left out in training.")
    return facts


def markdown(report: Report, title: str) -> str:
    """The whole report; images by their file names beside it."""
    parts = [f"# {title}", *_facts(report), *(f"**Refused.** {text}" for text in report.get("problems", ()))]
    for name, head, rows in _sections(report):
        lines = [head, ["---"] * len(head), *rows]
        table = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        parts += [f"## {name}", table]
    parts += [f"![{name}]({name})" for name in report.get("images", ())]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def html_page(report: Report, title: str, images: Mapping[str, bytes]) -> str:
    """The same as one page that needs no other file: ``images`` (PNG by name) are put into it."""
    from base64 import b64encode

    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in _facts(report))]
    body += [f'<p class="bad">{html.escape(text)}</p>' for text in report.get("problems", ())]
    for name, head, rows in _sections(report):
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(_td(cell) for cell in row) + "</tr>" for row in rows)
        body.append(f"<h2>{html.escape(name)}</h2><table><tr>{cells}</tr>{lines}</table>")
    body += [
        f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{b64encode(raw).decode()}"></p>'
        for name, raw in images.items()
    ]
    head_line = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head_line}</head><body>{''.join(body)}</body></html>\n"


def _td(cell: str) -> str:
    number = cell.replace(",", "").rstrip("%").replace(".", "").isdigit()
    return f'<td class="n">{cell}</td>' if number else f"<td>{html.escape(cell)}</td>"


def draw_lengths(path: Path, lengths: NDArray[np.int32]) -> None:
    """Histogram of characters of questions and answers, (rows, 2), on a logarithmic axis, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(2, int(lengths.max(initial=2)))
    bins = np.geomspace(1, longest + 1, 60)
    for side, name in enumerate(("questions", "answers")):
        known = lengths[:, side][lengths[:, side] > 0]
        if len(known):
            axes.stairs(np.histogram(known, bins)[0], bins, fill=True, alpha=0.6, label=f"{name}, {len(known):,} rows")
    axes.set(xscale="log", xlabel="characters", ylabel="rows", title="Lengths")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)
