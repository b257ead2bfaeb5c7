"""Check a training recipe's data, and train nothing: ``llmkit check-data recipe.yaml``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.context import Result, RunContext
from llmkit.data.guard.settings import GuardSettings
from llmkit.errors import DataError
from llmkit.modeling.settings import AdapterSettings
from llmkit.recipe import Conflict
from llmkit.training.settings import TrainingRecipe

if TYPE_CHECKING:
    from llmkit.data.guard.examine import Verdict

REPORT_MD, REPORT_HTML = "guard_report.md", "guard_report.html"


class Recipe(TrainingRecipe):
    """Check the data of a recipe for sft, lora or cpt, as it is; without ``data.guard`` the guard's defaults hold."""

    starts_over: ClassVar[bool] = True
    several_processes: ClassVar[bool] = False
    folder_suffix: ClassVar[str] = "-check-data"

    adapter: AdapterSettings | None = None
    """The adapter of a recipe for `llmkit lora`; not looked at."""

    def conflicts(self) -> Iterator[Conflict]:
        # the training that the recipe is for may have several processes; here all but the first have nothing to do
        yield from (found for found in super().conflicts() if found.key != "launch.processes")


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.data.guard.examine import examine
    from llmkit.data.guard.findings import metrics

    result = Result(stage="check-data", name=recipe.name, output_dir=ctx.output_dir)
    if not ctx.is_main:
        return result
    guard = recipe.data.guard or GuardSettings()
    data = recipe.data.model_copy(update={"guard": guard})
    found, refusals = _licences(recipe, guard, ctx)
    verdict = examine(data, guard, ctx.output_dir / "work", ctx.output_dir, ctx.progress)
    problems = [*refusals, *_unusable(verdict.report), *verdict.problems]
    numbers = metrics(verdict.report)
    artifacts = _publish(recipe, ctx, verdict, {"licences": found, "problems": problems})
    ctx.tracker.metrics(numbers, 0)
    if problems:
        raise DataError("\n".join([*problems, f"The whole report: {ctx.output_dir / REPORT_HTML}"]))
    return Result(stage="check-data", name=recipe.name, output_dir=ctx.output_dir, metrics=numbers, artifacts=artifacts)


def _unusable(report: dict[str, Any]) -> list[str]:
    """Rows that training would refuse, or that there are none at all."""
    found = report.get("unusable", {"rows": 0, "first": []})
    first = "\n".join(f"    {row['row']}: {row['reason']}" for row in found["first"][:3])
    if not report["rows"]:
        return [f"data.train: none of {found['rows']:,} rows can be learned from.\n{first}"]
    if not found["rows"] or found["action"] != "error":
        return []
    return [f"data.on_bad_row: {found['rows']:,} rows cannot be learned from. The first:\n{first}"]


def _licences(recipe: Recipe, guard: GuardSettings, ctx: RunContext) -> tuple[list[dict[str, str]], list[str]]:
    """Licences as rows of the report, and what ``allow_licenses`` refuses."""
    from llmkit.modeling.licences import as_rows, as_tags, licences, refuse

    found = licences(recipe.model, recipe.data)
    ctx.tracker.tags(as_tags(found))
    try:
        refuse(found, guard)
    except DataError as refusal:
        return as_rows(found), [str(refusal)]
    return as_rows(found), []


def _publish(recipe: Recipe, ctx: RunContext, verdict: Verdict, more: dict[str, Any]) -> dict[str, str]:
    """Write, print and track the report; gives the artifacts by name."""
    import shutil

    from llmkit.data.guard.examine import FILES
    from llmkit.data.guard.findings import REPORT
    from llmkit.data.guard.publish import html_page, markdown, text_table
    from llmkit.data.report import write_json
    from llmkit.data.sources import digest

    folder = ctx.output_dir
    shutil.rmtree(folder / "work", ignore_errors=True)
    images = [name for name in FILES if name.endswith(".png") and (folder / name).is_file()]
    report = verdict.report | more | {"images": images}
    title = f"Data of {recipe.name}"
    write_json(folder / REPORT, report)
    (folder / REPORT_MD).write_text(markdown(report, title), encoding="utf-8")
    page = html_page(report, title, {name: (folder / name).read_bytes() for name in images})
    (folder / REPORT_HTML).write_text(page, encoding="utf-8")
    for line in text_table(report).splitlines():
        ctx.progress.note(line)
    for path, fingerprint in digest(recipe.data).items():
        ctx.tracker.dataset(path.rsplit("/", 1)[-1], fingerprint, path, "train", {"rows": verdict.report["rows"]})
    files = [name for name in (*FILES, REPORT_MD, REPORT_HTML) if (folder / name).is_file()]
    for name in files:
        ctx.tracker.artifact(folder / name)
    return {name.rsplit(".", 1)[0] if name.endswith(".png") else name.replace(".", "_"): name for name in files}
