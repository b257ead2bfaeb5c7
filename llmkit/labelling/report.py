"""What a labelling job tells: numbers, ``report.md``, ``report.html``, a picture of the confidences."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.labelling.agreement import Agreement, cohen_kappa, krippendorff_alpha

if TYPE_CHECKING:
    from llmkit.labelling.finish import Found

REPORT, PAGE, PICTURE = "report.md", "report.html", "confidence.png"
_MOST = 100
"""Labels that the table of the report names, the most frequent ones."""

Table = list[list[str]]


def metrics_of(found: Found) -> dict[str, float]:
    """Numbers for the tracker, all finite."""
    confidence = np.concatenate(found.confidence) if found.confidence else np.array([])
    agreement = np.concatenate(found.agreement) if found.agreement else np.array([])
    total, abstained = len(confidence), sum(found.reasons.values())
    made = {"labelled": total - abstained, "abstained": abstained, "coverage": (total - abstained) / max(total, 1)}
    made |= {"confidence": _mean(confidence), "agreement": _mean(agreement)}
    made |= {f"abstained/{_name(reason)}": count for reason, count in found.reasons.items()}
    for name, one in _against_gold(found).items():
        prefix = "gold" if name == "labels" else f"gold/{_name(name)}"
        made |= {
            f"{prefix}_accuracy": one.accuracy, f"{prefix}_macro_f1": one.macro_f1, f"{prefix}_kappa": one.kappa,
        }  # fmt: skip
        if name == "labels":
            made |= {
                "gold_rows": one.rows,
                "gold_coverage": one.covered,
                "gold_calibration_error": one.calibration_error,
            }
    if found.texts.rows:
        made |= {"gold_rows": found.texts.rows, "gold_accuracy": found.texts.equal / found.texts.rows}
        if found.texts.fields:
            made["gold_field_accuracy"] = found.texts.equal_fields / found.texts.fields
    if len(found.voters) > 1 and found.votes:
        made["voters_alpha"] = krippendorff_alpha(np.concatenate(found.votes))
    return {name: float(value) for name, value in made.items() if np.isfinite(value)}


def _mean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _against_gold(found: Found) -> dict[str, Agreement]:
    """The labels, and where there are several voters each of them, against the gold labels."""
    if not found.gold:
        return {}
    gold, label = np.concatenate(found.gold), np.concatenate(found.label)
    sure = np.concatenate(found.confidence)
    made = {"labels": Agreement.measure(label, gold, sure)}
    if len(found.voters) > 1:
        votes = np.concatenate(found.votes)
        unknown = np.full(len(gold), np.nan)
        made |= {name: Agreement.measure(votes[:, n], gold, unknown) for n, name in enumerate(found.voters)}
    return made


def sections(found: Found, metrics: Mapping[str, float]) -> list[tuple[str, Table]]:
    """Titles and tables, the first row of each its head."""
    made: list[tuple[str, Table]] = []
    if found.counts:
        total = sum(found.counts.values())
        counts = [[name, f"{n:,}", f"{n / total:.1%}"] for name, n in found.counts.most_common(_MOST)]
        made.append(("Labels", [["label", "rows", "share"], *counts]))
    if found.reasons:
        made.append(("Abstained", [["reason", "rows"], *([r, f"{n:,}"] for r, n in found.reasons.most_common())]))
    if against := _against_gold(found):
        head = ["", "gold rows", "covered", "accuracy", "macro F1", "Cohen's kappa", "calibration error"]
        rows = [
            [name, f"{one.rows:,}", *map(_number, (one.covered, one.accuracy, one.macro_f1, one.kappa, one.calibration_error))]
            for name, one in against.items()
        ]  # fmt: skip
        made.append(("Against the gold labels", [head, *rows]))
    elif found.texts.rows:
        names = ("gold_rows", "gold_accuracy", "gold_field_accuracy")
        rows = [[name.removeprefix("gold_"), _number(metrics[name])] for name in names if name in metrics]
        made.append(("Against the gold answers", [["measure", "value"], *rows]))
    if len(found.voters) > 1 and found.votes:
        votes = np.concatenate(found.votes)
        pairs = [
            [found.voters[a], found.voters[b], _number(cohen_kappa(votes[:, a], votes[:, b]))]
            for a, b in combinations(range(len(found.voters)), 2)
        ]
        alpha = ["all", "", _number(krippendorff_alpha(votes))]
        made.append(
            ("Agreement of the voters (Cohen's kappa; all: Krippendorff's alpha)", [["", "", ""], *pairs, alpha])
        )
    if found.model is not None:
        rows = [
            [name, _number(float(np.diagonal(found.model.confusion[n]) @ found.model.prior))]
            for n, name in enumerate(_raters(found))
        ]
        made.append(("Accuracy of the voters as the label model estimates it", [["voter", "accuracy"], *rows]))
    if found.abstained:
        keys = list(found.abstained[0])
        rows = [[_cell(one[key]) for key in keys] for one in found.abstained]
        made.append(("The first rows that abstained", [keys, *rows]))
    return made


def _raters(found: Found) -> list[str]:
    """The label model's voters: every sample of one is a rater of its own."""
    assert found.model is not None
    samples = len(found.model.confusion) // len(found.voters)
    if samples == 1:
        return list(found.voters)
    return [f"{name} #{sample + 1}" for name in found.voters for sample in range(samples)]


def summary(metrics: Mapping[str, float]) -> str:
    """One line for the terminal."""
    parts = [f"{metrics['labelled']:,.0f} rows labelled, {metrics['abstained']:,.0f} abstained"]
    parts += [f"{name} {metrics[key]:.3f}" for name, key in _TOLD.items() if key in metrics]
    return ", ".join(parts)


_TOLD = {
    "confidence": "confidence", "accuracy": "gold_accuracy", "macro F1": "gold_macro_f1", "kappa": "gold_kappa",
    "voters' alpha": "voters_alpha",
}  # fmt: skip


def write(found: Found, metrics: Mapping[str, float], name: str, folder: Path) -> dict[str, Path]:
    """Write the report's files, and give them by what they are."""
    files = {"report": folder / REPORT, "page": folder / PAGE}
    picture = _picture(found, folder / PICTURE)
    if picture:
        files["confidence"] = folder / PICTURE
    tables = sections(found, metrics)
    lines = [f"# Labels of {name}", "", summary(metrics) + ".", *(f"\n{note}" for note in found.notes)]
    if picture:
        lines += ["", f"![confidence]({PICTURE})"]
    for title, table in tables:
        lines += ["", f"## {title}", "", *_markdown(table)]
    files["report"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    files["page"].write_text(_page(found, metrics, name, tables, files.get("confidence")), encoding="utf-8")
    return files


def _markdown(table: Table) -> list[str]:
    rows = [["" if not cell else re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row] for row in table]
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + " --- |" * len(table[0]), *body]


def _page(
    found: Found, metrics: Mapping[str, float], name: str, tables: Sequence[tuple[str, Table]], image: Path | None
) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    picture = base64.b64encode(image.read_bytes()).decode() if image else ""
    return environment.from_string(source).render(
        name=name, summary=summary(metrics), notes=found.notes, tables=tables, picture=picture
    )


def _picture(found: Found, path: Path) -> bool:
    """The histogram of the confidences; False where no row has one."""
    confidence = np.concatenate(found.confidence) if found.confidence else np.array([])
    known = confidence[~np.isnan(confidence)]
    if not len(known):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.hist(known, bins=[n / 20 for n in range(21)])
    axis.set_xlabel("confidence")
    axis.set_ylabel("rows")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def asked(prompt: Any) -> str:
    """What a prompt asks, for people: its last message, shortened."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""
    return text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"


def _cell(value: Any) -> str:
    return "" if value is None else _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return (
        "" if not np.isfinite(value) else f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"
    )


def _name(text: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w.\- /]", "_", text)
