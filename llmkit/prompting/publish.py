"""What a prompt test leaves behind: files in its folder, numbers in the tracker, lines on the terminal, an exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.context import RunContext, Tracker
from llmkit.errors import GateError, MissingError
from llmkit.prompting import junit, outcomes, pages
from llmkit.prompting.outcomes import Outcome, named_scores, share, shares
from llmkit.prompting.pages import Findings

if TYPE_CHECKING:
    from llmkit.prompting.suite import Suite

TABLE = "results_table.json"
SAMPLES = 3


def run_before(folder: Path, compare_to: str | None) -> Path | None:
    """The run to compare with: the one that was last moved aside from ``folder``, or the one that is named.

    Raises MissingError where a named one has no results.
    """
    if compare_to is None:
        return None
    if compare_to != "last":
        named = Path(compare_to)
        if outcomes.read_results(named) is None:
            raise MissingError(f"compare_to: {named} has no {outcomes.RESULTS} of a prompt test that can be read.")
        return named
    aside = [path for path in folder.parent.glob(f"{folder.name}.*") if path.suffix[1:].isdigit()]
    found = [path for path in aside if path.stem == folder.name and (path / outcomes.RESULTS).is_file()]
    return max(found, key=lambda path: int(path.suffix[1:]), default=None)


def record_inputs(suite: Suite, tracker: Tracker) -> None:
    """The cases as an input of the run, each file by its digest."""
    for path, digest in suite.recipe.input_digests().items():
        kind = "template" if path.endswith(".jinja") else "eval"
        tracker.dataset(Path(path).name, digest, path, kind, {"cases": len(suite.tests)})


def publish(found: Findings, suite: Suite, ctx: RunContext) -> tuple[dict[str, float], dict[str, str]]:
    """Write the reports, record them, print the table. Gives metrics, and artifacts by what they are."""
    files = _files(found, suite, ctx.output_dir)
    metrics = metrics_of(found)
    ctx.tracker.metrics(metrics, step=0)
    if "table" in files:  # by this tag MLflow's page shows the file as a table
        ctx.tracker.tags({"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])})
    for path in files.values():
        ctx.tracker.artifact(path)
    ctx.progress.note(pages.terminal(found))
    return metrics, {name: path.name for name, path in files.items()}


def _files(found: Findings, suite: Suite, folder: Path) -> dict[str, Path]:
    texts = {
        "report": ("report.md", pages.markdown(found)),
        "page": ("report.html", pages.html(found)),
    }
    if tokens := suite.token_page():
        texts["tokens"] = ("tokens.html", tokens)
    if found.statics:
        static = [one.to_dict() for one in found.statics]
        texts["static"] = ("static.json", json.dumps(static, ensure_ascii=False, indent=1))
    if found.outcomes:
        texts["table"] = (TABLE, json.dumps(pages.table(found), ensure_ascii=False, default=str))
    files = {}
    for name, (file, text) in texts.items():
        files[name] = folder / file
        files[name].write_text(text, encoding="utf-8", errors="backslashreplace")
    files["junit"] = junit.write(folder / "junit.xml", found.name, found.outcomes, found.statics)
    if found.outcomes:
        files["results"] = outcomes.write(found.outcomes, folder)
    return files


def metrics_of(found: Findings) -> dict[str, float]:
    """Numbers for the tracker; names hold only what MLflow allows in them."""
    made: dict[str, float] = {}
    every = share(found.outcomes)
    if every.total:
        made |= {"pass_rate": every.rate, "cases": every.total, "failed": every.total - every.passed}
        made["errors"] = sum(one.error is not None for one in found.outcomes)
        made["score"] = sum(one.score for one in found.outcomes) / every.total
        made["output_tokens"] = sum(one.tokens or 0 for one in found.outcomes)
        made["answer_seconds"] = sum(one.seconds for one in found.outcomes) / every.total
        for what in ("template", "model"):
            by_name = shares(found.outcomes, attrgetter(what))
            made |= {f"pass_rate/{what}/{_name(name)}": one.rate for name, one in by_name.items()}
        made |= {f"score/{_name(name)}": score for name, score in named_scores(found.outcomes).items()}
    if found.statics:
        made["static_errors"] = sum(len(one.errors) for one in found.statics)
        made["static_warnings"] = sum(len(one.warnings) for one in found.statics)
        totals = [tokens.prompt for one in found.statics for tokens in one.tokens]
        if totals:
            made |= {"prompt_tokens_mean": sum(totals) / len(totals), "prompt_tokens_max": max(totals)}
        costs = [one.cost for one in found.statics if one.cost is not None]
        if costs:
            made["cost"] = sum(costs)
    if found.comparison is not None:
        made |= {
            "broke": len(found.comparison.broke), "fixed": len(found.comparison.fixed), "mcnemar_p": found.comparison.p,
        }  # fmt: skip
    return {name: float(value) for name, value in made.items()}


def _name(text: str) -> str:
    return re.sub(r"[^\w.\- /]", "_", text)


def samples(failed: Sequence[Outcome]) -> list[dict[str, str]]:
    """The first answers that did not pass, for the summary."""
    return [
        {"prompt": _question(one), "reference": one.expected or "", "after": one.output} for one in failed[:SAMPLES]
    ]


def _question(outcome: Outcome) -> str:
    """The last message, which is what the case asks; the messages before it are the same for every case."""
    return outcome.prompt if isinstance(outcome.prompt, str) else str(outcome.prompt[-1].get("content") or "")


def gate(found: Findings, folder: Path, metrics: Mapping[str, float], artifacts: Mapping[str, str]) -> None:
    """Raises GateError for errors of the static checks and for every threshold that was not met."""
    broken = [report for report in found.statics if report.errors]
    lines = [
        f"{len(report.errors)} error{'s' * (len(report.errors) != 1)} in {report.template} with {report.model}: "
        f"{report.errors[0].message}"
        for report in broken
    ]
    if lines:
        lines = [
            "the static checks found errors, so nothing was generated (static: false leaves them out):",
            *lines,
        ]
    lines += found.shortfalls
    if lines:
        text = "\n  ".join([*lines, f"report: {folder / artifacts['page']}"])
        raise GateError(text, metrics=metrics, artifacts=artifacts)
