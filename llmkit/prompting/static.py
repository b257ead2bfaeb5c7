"""Static checks of a prompt: everything that can be known from the template and the tokenizer, without weights.

::

    report = check_static(load_template("en-query-rewriting"), open_subject("Qwen/Qwen3-0.6B"), cases)
    report.passed, report.issues, report.tokens
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmkit.errors import DataError
from llmkit.prompting import checks
from llmkit.prompting.checks import Found
from llmkit.prompting.few_shot import Demonstrations
from llmkit.prompting.report import CHECKS, Case, CaseTokens, Check, Issue, Prices, Severity, StaticReport, Subject
from llmkit.prompting.template import PromptTemplate
from llmkit.prompting.views import Bench, View, make_views

__all__ = [
    "CHECKS", "Case", "CaseTokens", "Check", "Issue", "Prices", "StaticReport", "Subject", "VersionDiff",
    "check_static", "compare_versions", "open_subject",
]  # fmt: skip

_HUGE = 10**9
_OF_CHATS = (
    "content", "generation-marks", "newlines", "prefix", "system", "tools", "thinking", "literal-specials",
    "transformers-path", "vllm-path",
)  # fmt: skip


def open_subject(
    name_or_path: str,
    *,
    name: str | None = None,
    chat_template: str | None = None,
    system: str | None = None,
    supervise: Literal["all", "last"] = "all",
    trust_remote_code: bool = False,
) -> Subject:
    """A model's tokenizer and stop tokens, from a folder or a hub id; no weights are read.

    Raises MissingError when there is no tokenizer.
    """
    from llmkit.modeling.locate import find_folder
    from llmkit.modeling.tokenizer import configured_stops, open_tokenizer

    folder = find_folder(name_or_path, weights=False)
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Subject(
        name or name_or_path,
        tokenizer,
        chat_template=chat_template,
        system=system,
        supervise=supervise,
        seq2seq=_is_seq2seq(folder),
        stop_ids=tuple(configured_stops(folder)) or None,
    )


def _is_seq2seq(folder: Path) -> bool:
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("is_encoder_decoder", False))


class _Findings:
    """Gathers what checks find; the same finding in many cases is one issue that counts them."""

    def __init__(self, template: str, model: str) -> None:
        self._template, self._model = template, model
        self._found: dict[tuple[str, Severity, str], tuple[Found, str | None, int]] = {}

    def add(self, found: Iterable[Found], case: str | None = None) -> None:
        seen = set()
        for one in found:
            key = one[:3]
            first, first_case, count = self._found.get(key, (one, case, 0))
            self._found[key] = (first, first_case, count + (case is not None and key not in seen))
            seen.add(key)

    def issues(self) -> list[Issue]:
        order = {check.id: n for n, check in enumerate(CHECKS)}
        severities = ("error", "warning", "info")
        made = [
            Issue(one.check, one.severity, one.message, self._template, self._model, case, one.detail, count)
            for one, case, count in self._found.values()
        ]
        return sorted(made, key=lambda issue: (severities.index(issue.severity), order[issue.check], issue.message))


def check_static(
    template: PromptTemplate | None,
    subject: Subject,
    cases: Sequence[Case],
    *,
    max_length: int | None = None,
    prices: Prices = Prices(),  # noqa: B008  frozen
    demonstrations: Demonstrations | None = None,
) -> StaticReport:
    """Hold a prompt template (None: the cases' own messages) and a model's chat template against each other.

    ``max_length`` is the length of training in tokens; answers cut by it are errors. ``prices`` are per million
    tokens. ``demonstrations`` choose a template's examples where they are not compared by letters. Never raises for
    what is wrong with template, tokenizer or cases: that is what the report says.
    """
    title = template.title if template else "chat template"
    findings = _Findings(title, subject.name)
    report = StaticReport(title, subject.name)
    try:
        bench = Bench(subject)
        views = make_views(template, bench, cases, demonstrations)
    except DataError as error:
        findings.add([Found("renders", "error", str(error))])
        report.issues = findings.issues()
        report.skipped = [check.id for check in CHECKS if check.id != "renders"]
        return report
    findings.add(_check_variables(template, bench))
    findings.add(checks.check_model(bench))
    for view in views:
        findings.add(_check_view(view, bench), view.case.id)
        findings.add(_check_length(view, bench, max_length), view.case.id)
        findings.add(_check_schema(view, template), view.case.id)
    report.tokens = [_count(view, max_length) for view in views if view.prompt is not None]
    report.cost = _cost(report.tokens, prices)
    report.issues = findings.issues()
    report.skipped = _skipped(template, bench, views, max_length)
    return report


def _check_variables(template: PromptTemplate | None, bench: Bench) -> Iterator[Found]:
    if template is None:
        if bench.chat is None:
            yield Found("renders", "error", "the tokenizer has no chat template: set data.chat_template")
        return
    if template.kind == "chat" and bench.chat is None:
        what = "the tokenizer has no chat template for these messages: write `kind: text`, or set data.chat_template"
        yield Found("renders", "error", what)
    for name in template.unused_variables:
        yield Found("variables", "warning", f"`{name}` is declared and never used: the prompt does not depend on it")
    if template.kind == "text" and bench.chat is not None:
        yield Found(
            "renders",
            "info",
            "a template of the kind text is continued as it is, without the chat template that this model was tuned with",
        )


def _check_view(view: View, bench: Bench) -> Iterator[Found]:
    """All that is wrong with one case; when tokens cannot be made and the text does not say why, their reason."""
    if view.render_problem:
        variable = "missing (the case has" in view.render_problem or " must be " in view.render_problem
        yield Found(
            "variables" if variable else "renders", "error", "the template does not render", view.render_problem
        )
        return
    found: list[Found] = []
    if bench.chat is not None and view.text is None and not bench.subject.seq2seq:
        found += checks.check_text(view, bench)
        found += checks.check_marks(view, bench)
    if not bench.subject.seq2seq:
        found += checks.check_tokens(view, bench)
        found += checks.check_paths(view, bench)
    yield from found
    if not any(one.severity == "error" for one in found):
        for problem in dict.fromkeys(filter(None, (view.prompt_problem, view.train_problem))):
            yield Found("renders", "error", "the conversation cannot be made into tokens", problem)
    if view.prompt is None and not any(one.check == "bos" for one in found):
        yield from _bos_of_text(view, bench)


def _bos_of_text(view: View, bench: Bench) -> Iterator[Found]:
    """BOS of a prompt that llmkit refuses to make, by what a server would make of it."""
    if bench.chat is None or view.text is not None or not view.messages:
        return
    try:
        text = bench.chat.render(view.messages[:-1], view.tools, prompt=True)
    except (ValueError, DataError):
        return
    yield from checks.check_bos(bench.plain_ids(text), "prompt", bench)


def _check_length(view: View, bench: Bench, max_length: int | None) -> Iterator[Found]:
    """What a limit would take away; the tokenizer's own limit is one where a trainer or server truncates."""
    longest = view.length
    own = bench.tokenizer.model_max_length
    own = int(own) if own is not None and own < _HUGE else None
    if max_length is not None and longest > max_length:
        cut = longest - max_length
        what = f"longer than max_length {max_length}" + (": the end of the answer would be cut" if view.known else "")
        yield Found("max-length", "error", what, f"{longest} tokens, {cut} too many")
    elif own is not None and longest > own:
        what = f"longer than the tokenizer's model_max_length {own}: whoever truncates by it cuts the answer"
        yield Found("max-length", "warning", what, f"{longest} tokens, {longest - own} too many")


def _check_schema(view: View, template: PromptTemplate | None) -> Iterator[Found]:
    if template is None or template.output_schema is None or not view.known or view.answer is None:
        return
    import json

    import jsonschema

    try:
        jsonschema.validate(json.loads(view.answer), template.output_schema)
    except ValueError as error:
        yield Found("output-schema", "error", "the right answer is not JSON", f"{error}: {view.answer[:60]!r}")
    except jsonschema.ValidationError as error:
        where = "".join(f".{part}" for part in error.absolute_path).lstrip(".")
        detail = f"{where}: {error.message}" if where else error.message
        yield Found("output-schema", "error", "the right answer does not follow output_schema", detail[:200])


def _count(view: View, max_length: int | None) -> CaseTokens:
    cut = max(0, view.length - max_length) if max_length else 0
    return CaseTokens(view.case.id, len(view.prompt or []), view.answer_tokens, view.length, cut)


def _cost(tokens: Sequence[CaseTokens], prices: Prices) -> float | None:
    if not prices.input and not prices.output:
        return None
    return sum(one.prompt * prices.input + one.answer * prices.output for one in tokens) / 1e6


def _skipped(template: PromptTemplate | None, bench: Bench, views: Sequence[View], max_length: int | None) -> list[str]:
    """Ids of checks that had nothing to look at."""
    left: set[str] = set()
    if template is None:
        left.add("variables")
    if template is None or template.output_schema is None or not any(view.known for view in views):
        left.add("output-schema")
    if bench.chat is None or bench.subject.seq2seq or (template is not None and template.kind == "text"):
        left.update(_OF_CHATS)
    if "generation %}" not in (bench.renderer.chat_template or ""):
        left.add("generation-marks")
    if max_length is None and bench.tokenizer.model_max_length >= _HUGE:
        left.add("max-length")
    if not views:
        left.update(check.id for check in CHECKS if check.id not in ("variables", "system", "literal-specials"))
    return [check.id for check in CHECKS if check.id in left]


# ---- versions ----


@dataclass
class VersionDiff:
    """What changed between two versions of a template, by the prompts of the cases.

    ``diffs`` are unified diffs by case, of those that changed; ``tokens`` the prompt tokens of a case, old and new.
    """

    old: str
    new: str
    diffs: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """Cases that one of the two does not render, and why."""

    @property
    def mean_tokens(self) -> tuple[float, float]:
        if not self.tokens:
            return 0.0, 0.0
        both = list(zip(*self.tokens.values(), strict=True))
        return sum(both[0]) / len(both[0]), sum(both[1]) / len(both[1])

    def text(self, cases: int = 3) -> str:
        """For a terminal: counts, and the diffs of the first cases."""
        before, after = self.mean_tokens
        change = f" ({(after - before) / before:+.0%})" if before else ""
        lines = [
            f"{self.old} → {self.new}: {len(self.diffs)} of {len(self.tokens)} prompts changed, "
            f"{before:.1f} → {after:.1f} tokens a prompt{change}"
        ]
        for case, diff in list(self.diffs.items())[:cases]:
            old, new = self.tokens[case]
            lines += ["", f"{case}: {old} → {new} tokens", diff]
        lines += [f"{case}: {problem}" for case, problem in self.problems.items()]
        return "\n".join(lines)


def compare_versions(
    old: PromptTemplate,
    new: PromptTemplate,
    subject: Subject,
    cases: Sequence[Case],
    *,
    old_demonstrations: Demonstrations | None = None,
    new_demonstrations: Demonstrations | None = None,
) -> VersionDiff:
    """The prompts of the same cases by two versions of a template, and what they cost in tokens.

    Raises DataError for a chat template or demonstrations that cannot be read.
    """
    bench = Bench(subject)
    before = make_views(old, bench, cases, old_demonstrations)
    after = make_views(new, bench, cases, new_demonstrations)
    made = VersionDiff(old.title, new.title)
    for one, other in zip(before, after, strict=True):
        problem = next(filter(None, (v.render_problem or v.prompt_problem for v in (one, other))), "")
        if problem or one.prompt is None or other.prompt is None:
            made.problems[one.case.id] = problem
            continue
        made.tokens[one.case.id] = (len(one.prompt), len(other.prompt))
        if diff := _diff(_lines(one), _lines(other), old.title, new.title):
            made.diffs[one.case.id] = diff
    return made


def _lines(view: View) -> list[str]:
    """A prompt as lines for a diff, each message under its role."""
    if view.text is not None:
        return view.text.split("\n")
    messages: list[dict[str, Any]] = view.messages[:-1]
    return [line for message in messages for line in (f"[{message['role']}]", *message["content"].split("\n"))]


def _diff(one: list[str], other: list[str], old: str, new: str) -> str:
    return "\n".join(difflib.unified_diff(one, other, old, new, lineterm="", n=2))
