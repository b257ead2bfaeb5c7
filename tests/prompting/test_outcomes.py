"""Shares, thresholds and the paired comparison of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.prompting.assertions import Grade
from llmkit.prompting.outcomes import (
    Outcome,
    compare,
    mcnemar,
    named_scores,
    read_results,
    share,
    shares,
    shortfalls,
    write,
)


def outcome(key: str, passed: bool, template: str = "t@1", model: str = "m", **more: object) -> Outcome:
    return Outcome(template, model, key, f"case {key}", passed, float(passed), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broke", "fixed", "p"),
    # statsmodels.stats.contingency_tables.mcnemar(exact=True) and scipy.stats.binomtest(b, b + c).pvalue
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 0.0625),
        (0, 6, 0.03125),
        (2, 10, 0.03857421875),
        (5, 5, 1.0),
        (3, 12, 0.03515625),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(broke: int, fixed: int, p: float) -> None:
    assert mcnemar(broke, fixed) == mcnemar(fixed, broke) == pytest.approx(p)


def test_shares() -> None:
    found = [outcome("a", True), outcome("b", False), outcome("a", True, "u@1")]
    assert str(share(found)) == "67% (2/3)"
    assert {name: one.rate for name, one in shares(found, lambda o: o.template).items()} == {"t@1": 0.5, "u@1": 1.0}
    assert share([]).rate == 0.0
    grades = (Grade("x", True, 1.0, "", metric="tone", inner=(Grade("y", True, 0.0, "", metric="tone"),)),)
    assert named_scores([outcome("a", True, grades=grades)]) == {"tone": 0.5}


def test_thresholds_by_name_and_for_all() -> None:
    found = [outcome("a", True), outcome("b", False), outcome("a", True, "u@2")]
    assert list(shortfalls(found, {"overall": 0.6, "template": 0.5, "model": 0.6})) == []
    assert list(shortfalls(found, {"overall": 0.7})) == ["67% (2/3) of all cases passed, thresholds.overall is 70%"]
    assert list(shortfalls(found, {"template": {"t": 0.6, "u@2": 1.0}})) == [
        "50% (1/2) passed with template t@1, thresholds.template is 60%"
    ]
    assert list(shortfalls(found, {"model": 0.9})) == ["67% (2/3) passed with model m, thresholds.model is 90%"]


def test_two_runs_are_paired(tmp_path: Path) -> None:
    before = [outcome("a", True, output="was"), outcome("b", False), outcome("c", True), outcome("gone", True)]
    write(before, tmp_path)
    old = read_results(tmp_path)
    assert old is not None
    now = [outcome("a", False), outcome("b", True), outcome("c", True), outcome("new", False)]
    found = compare(now, old, "runs/x.1")
    assert [one.key for one in found.broke] == ["a"]
    assert [one.key for one in found.fixed] == ["b"]
    assert (found.before.rate, found.now.rate) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (found.only_now, found.only_before, found.p) == (1, 1, 1.0)
    assert found.was["t@1", "m", "a"] == "was"
    assert "1 broke, 1 got fixed" in found.headline


def test_a_new_version_of_a_template_is_paired_with_the_old_one(tmp_path: Path) -> None:
    write([outcome("a", True, "t@1"), outcome("a", True, "u@1"), outcome("a", True, "u@2")], tmp_path)
    old = read_results(tmp_path) or []
    found = compare([outcome("a", False, "t@2"), outcome("a", False, "u@3")], old, "x")
    assert [one.template for one in found.broke] == ["t@2"], "of u it is not known which version u@3 follows"


def test_half_a_surrogate_pair_is_written_and_read(tmp_path: Path) -> None:
    write([outcome("a", True, output="x\ud800")], tmp_path)
    assert (read_results(tmp_path) or [])[0].output == "x\ud800"


def test_a_damaged_or_missing_file_is_no_run(tmp_path: Path) -> None:
    assert read_results(tmp_path) is None
    (tmp_path / "results.jsonl").write_text('{"template": 1}\n')
    assert read_results(tmp_path) is None
