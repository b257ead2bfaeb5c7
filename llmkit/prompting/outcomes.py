"""What came out of a prompt test: one outcome a case, template and model; their shares; and how two runs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from llmkit.data.rows import Message
from llmkit.prompting.assertions import Grade

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Outcome:
    """One answer and its grades. ``key`` names the case in every run; ``error`` says why there is no answer."""

    template: str
    model: str
    key: str
    case: str
    passed: bool
    score: float
    description: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)
    prompt: Sequence[Message] | str = ""
    output: str = ""
    expected: str | None = None
    grades: tuple[Grade, ...] = ()
    error: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    seconds: float = 0.0
    finished: bool = True

    @property
    def why(self) -> str:
        """What failed, in one line; empty for a case that passed."""
        if self.error:
            return self.error
        failed = [f"{one.type}: {one.reason}" for one in self.grades if not one.passed and one.weight > 0]
        return "" if self.passed else "; ".join(failed)


@dataclass(frozen=True)
class Share:
    """How many of some outcomes passed."""

    passed: int
    total: int

    @property
    def rate(self) -> float:
        return self.passed / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.rate:.0%} ({self.passed}/{self.total})"


def share(outcomes: Iterable[Outcome]) -> Share:
    found = [outcome.passed for outcome in outcomes]
    return Share(sum(found), len(found))


def shares(outcomes: Sequence[Outcome], of: Callable[[Outcome], str]) -> dict[str, Share]:
    """Shares by template, model or another name, in the order of the outcomes."""
    names = dict.fromkeys(map(of, outcomes))
    return {name: share(one for one in outcomes if of(one) == name) for name in names}


def named_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean score of each ``metric`` that assertions name."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        for one in outcome.grades:
            for grade in (one, *one.inner):
                if grade.metric:
                    found.setdefault(grade.metric, []).append(grade.score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def write(outcomes: Iterable[Outcome], folder: Path) -> Path:
    """``results.jsonl``, one outcome a line."""
    path = folder / RESULTS
    lines = [json.dumps(asdict(outcome), ensure_ascii=False, default=str) for outcome in outcomes]
    # Half a surrogate pair, which a server may send, becomes the escape that JSON has for it.
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    return path


@dataclass(frozen=True)
class Before:
    """What a comparison needs to know of an outcome of another run."""

    template: str
    model: str
    key: str
    passed: bool
    output: str


def read_results(folder: Path) -> list[Before] | None:
    """The outcomes of another run; None where its folder holds none that can be read."""
    try:
        lines = (folder / RESULTS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [Before(r["template"], r["model"], r["key"], bool(r["passed"]), r["output"]) for r in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Comparison:
    """Two runs on the cases that both have. ``p`` is that of McNemar's exact test, for both directions.

    ``only_now`` and ``only_before`` count the outcomes without a partner.
    """

    folder: str
    broke: tuple[Outcome, ...]
    fixed: tuple[Outcome, ...]
    before: Share
    now: Share
    p: float
    only_now: int = 0
    only_before: int = 0
    was: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    """Answers before, of what broke or got fixed, by template, model and key."""

    @property
    def headline(self) -> str:
        if not self.now.total:
            return f"against {self.folder}: no case in common"
        sure = "" if self.p >= 0.05 or not (self.broke or self.fixed) else ", more than chance"
        return (
            f"against {self.folder}: {self.before.rate:.0%} → {self.now.rate:.0%} on {self.now.total} cases in common, "
            f"{len(self.broke)} broke, {len(self.fixed)} got fixed (McNemar p = {self.p:.3g}{sure})"
        )


def mcnemar(broke: int, fixed: int) -> float:
    """p of McNemar's exact test: twice the binomial tail of the rarer change among all changes, at most 1.

    McNemar, 1947: Note on the sampling error of the difference between correlated proportions or percentages.
    """
    changes = broke + fixed
    if not changes:
        return 1.0
    tail = sum(math.comb(changes, k) for k in range(min(broke, fixed) + 1))
    return float(min(1.0, 2 * tail / 2**changes))


def compare(now: Sequence[Outcome], before: Sequence[Before], folder: str) -> Comparison:
    """Pair outcomes by template, model and case. A template whose version changed is paired by its name alone."""
    renamed = _renamed({outcome.template for outcome in now}, {outcome.template for outcome in before})
    old = {(renamed.get(b.template, b.template), b.model, b.key): b for b in before}
    pairs = [(outcome, old[place]) for outcome in now if (place := _place(outcome)) in old]
    broke = tuple(outcome for outcome, was in pairs if was.passed and not outcome.passed)
    fixed = tuple(outcome for outcome, was in pairs if outcome.passed and not was.passed)
    return Comparison(
        folder=folder, broke=broke, fixed=fixed,
        before=Share(sum(was.passed for _, was in pairs), len(pairs)), now=share(outcome for outcome, _ in pairs),
        p=mcnemar(len(broke), len(fixed)), only_now=len(now) - len(pairs), only_before=len(old) - len(pairs),
        was={_place(outcome): old[_place(outcome)].output for outcome in (*broke, *fixed)},
    )  # fmt: skip


def _place(outcome: Outcome) -> tuple[str, str, str]:
    return outcome.template, outcome.model, outcome.key


def _renamed(now: set[str], before: set[str]) -> dict[str, str]:
    """Titles of before to titles of now, for templates of which each run has one version, and not the same."""
    found: dict[str, str] = {}
    for title in before - now:
        name = title.rpartition("@")[0]
        ours = [other for other in now if other.rpartition("@")[0] == name]
        theirs = [other for other in before if other.rpartition("@")[0] == name]
        if name and len(ours) == len(theirs) == 1:
            found[title] = ours[0]
    return found


def shortfalls(outcomes: Sequence[Outcome], thresholds: Mapping[str, Any]) -> Iterator[str]:
    """Every threshold that was not met, in words. ``thresholds``: overall, template and model, as in the recipe."""
    overall = thresholds.get("overall")
    if overall is not None and (found := share(outcomes)).rate < overall:
        yield f"{found} of all cases passed, thresholds.overall is {overall:.0%}"
    for what in ("template", "model"):
        wanted = thresholds.get(what)
        if wanted is None:
            continue
        for name, one in shares(outcomes, attrgetter(what)).items():
            least = wanted if isinstance(wanted, int | float) else _least(wanted, name)
            if least is not None and one.rate < least:
                yield f"{one} passed with {what} {name}, thresholds.{what} is {least:.0%}"


def _least(wanted: Mapping[str, float], name: str) -> float | None:
    """The threshold of a template under its title (``name@version``) or its name."""
    return wanted.get(name, wanted.get(name.rpartition("@")[0]))
