"""The table on the terminal, the Markdown and HTML reports, and JUnit XML as CI servers read it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmkit.prompting import junit, pages
from llmkit.prompting.assertions import Grade
from llmkit.prompting.outcomes import Outcome, compare, read_results, write
from llmkit.prompting.pages import Findings
from llmkit.prompting.report import Issue, StaticReport

NASTY = "<script>alert(1)</script> | `x` \x07 ``` 한국어 \ud800"


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": NASTY}]
    inner = (Grade("bleu", False, 0.1, "BLEU 0.1"),)
    grades = (
        Grade("contains", True, 1.0, "has it"),
        Grade("assert-set", False, 0.5, "bleu: low", metric="tone", inner=inner),
    )
    outcomes = [
        Outcome("질의@1", "m", "a", "case a", True, 1.0, prompt=prompt, output="fine", seconds=0.25, tokens=3),
        Outcome(
            "질의@1",
            "m",
            "b",
            "case b",
            False,
            0.5,
            "a word",
            prompt=prompt,
            output=NASTY,
            expected="good",
            grades=grades,
        ),
        Outcome("u@1", "m", "a", "case a", False, 0.0, error="status 500", finished=False),
        Outcome("u@1", "n", "a", "case a", True, 1.0, prompt="text"),
    ]
    write([Outcome("질의@1", "m", "b", "case b", True, 1.0, output="was good")], tmp_path)
    static = StaticReport("질의@1", "m", [
        Issue("bos", "error", "BOS twice", "질의@1", "m", "case a", NASTY, 2), Issue("tools", "info", "no tools", "질의@1", "m"),
    ], skipped=["newlines"])  # fmt: skip
    return Findings(
        "demo", outcomes, [static], comparison=compare(outcomes, read_results(tmp_path) or [], "runs/x.1"),
        shortfalls=["50% is too little"], notes=["a note"], names=(["질의@1", "u@1"], ["m", "n"]),
    )  # fmt: skip


def test_the_table_has_sums_and_lines_up_whatever_the_script(found: Findings) -> None:
    from rich.cells import cell_len

    assert pages.rows(found) == [
        ["template", "m", "n", "all"],
        ["질의@1", "50% (1/2); static: 1 error", "-", "50% (1/2)"],
        ["u@1", "0% (0/1)", "100% (1/1)", "50% (1/2)"],
        ["all", "33% (1/3)", "100% (1/1)", "50% (2/4)"],
    ]
    lines = pages.terminal(found).splitlines()[:5]
    starts = {cell_len(line[: line.index(mark)]) for line, mark in zip(lines[2:], ("50%", "0%", "33%"), strict=True)}
    assert len(starts) == 1
    one = Findings("x", found.outcomes[:2], names=(["질의@1"], ["m"]))
    assert pages.rows(one) == [["template", "m"], ["질의@1", "50% (1/2)"]]


def test_the_terminal_says_what_failed_and_what_broke(found: Findings) -> None:
    text = pages.terminal(found)
    assert "질의@1 × m, case b: assert-set: bleu: low" in text
    assert "u@1 × m, case a: status 500" in text
    assert "broke: 질의@1 × m, case b" in text
    assert "error: bos: BOS twice (2 cases, first case a)" in text
    assert "below a threshold: 50% is too little" in text
    assert "a note" in text


def test_markdown_holds_whatever_a_model_says(found: Findings) -> None:
    text = pages.markdown(found)
    fences = re.findall(r"^(`{3,})", text, re.MULTILINE)
    assert len(fences) % 2 == 0
    assert "````text" in text, "the answer has three backticks, so its fence has four"
    assert "<script>" not in re.sub(r"(`{3,})text\n.*?\1", "", text, flags=re.DOTALL)
    assert "| tone | 0.500 |" in text
    assert "**50% (2/4)** passed, 1 without an answer." in text


def test_html_is_one_page_in_which_nothing_is_run(found: Findings) -> None:
    text = pages.html(found)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"""(?:src|href)=["']""", text), "nothing is fetched"
    assert text.count("<details") == 5
    assert "· bleu" in text
    assert "was good" in text


def test_the_table_for_mlflow_is_columns_and_rows(found: Findings) -> None:
    table = json.loads(json.dumps(pages.table(found)))
    assert len(table["columns"]) == len(table["data"][0]) == 11
    assert table["data"][2][table["columns"].index("why")] == "status 500"


def test_junit_as_its_readers_read_it(found: Findings, tmp_path: Path) -> None:
    from junitparser import Error, Failure, JUnitXml, Skipped

    read = JUnitXml.fromfile(str(junit.write(tmp_path / "junit.xml", "demo", found.outcomes, found.statics)))
    suites = {suite.name: suite for suite in read}
    assert list(suites) == ["static: 질의@1 × m", "질의@1 × m", "u@1 × m", "u@1 × n"]
    assert (read.tests, read.failures, read.errors) == (sum(s.tests for s in suites.values()), 2, 1)
    static = {case.name.split(":")[0]: case.result for case in suites["static: 질의@1 × m"]}
    assert isinstance(static["bos"][0], Failure)
    assert isinstance(static["newlines"][0], Skipped)
    assert static["tools"] == [], "what is good to know fails nothing"
    assert suites["static: 질의@1 × m"].skipped == 1
    _, failed = suites["질의@1 × m"]
    assert failed.name == "case b a word"
    assert failed.result[0].message == "assert-set: bleu: low"
    assert "한국어" in failed.result[0].text
    (error,) = suites["u@1 × m"]
    assert isinstance(error.result[0], Error)
    assert next(iter(suites["질의@1 × m"])).time == 0.25


def test_junit_keeps_to_the_schema(found: Findings, tmp_path: Path) -> None:
    """The rules of junit-10.xsd that a file like ours can break: names, order and types of attributes and elements."""
    from xml.etree import ElementTree

    root = ElementTree.parse(junit.write(tmp_path / "junit.xml", "demo", found.outcomes, found.statics)).getroot()
    assert root.tag == "testsuites"
    assert set(root.attrib) <= {"name", "time", "tests", "failures", "disabled", "errors"}
    for suite in root:
        assert suite.tag == "testsuite"
        assert {"name", "tests", "failures", "errors"} <= set(suite.attrib)
        assert all(suite.attrib[name].isdigit() for name in ("tests", "failures", "errors", "skipped"))
        cases = list(suite)
        assert {case.tag for case in cases} == {"testcase"}
        assert int(suite.attrib["tests"]) == len(cases)
        assert int(suite.attrib["failures"]) == sum(case.find("failure") is not None for case in cases)
        for case in cases:
            assert {"name", "classname", "time"} == set(case.attrib)
            assert float(case.attrib["time"]) >= 0
            assert {part.tag for part in case} <= {"skipped", "error", "failure"}
            assert all(set(part.attrib) <= {"message", "type"} for part in case)
