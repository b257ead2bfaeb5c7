"""JUnit XML, which CI servers show as tests: a suite for each template and model, a test for each case.

The shape is that of the schema of Jenkins' xunit plugin (junit-10.xsd), which GitLab, GitHub actions and others read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from llmkit.prompting.outcomes import Outcome
from llmkit.prompting.report import StaticReport

# Characters that XML 1.0 cannot hold, whatever the escaping.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(path: Path, name: str, outcomes: Sequence[Outcome], statics: Sequence[StaticReport]) -> Path:
    """The file. A failed check is a failure, a case without an answer an error."""
    root = ElementTree.Element("testsuites", {"name": _clean(name)})
    totals = [_static_suite(root, report) for report in statics]
    places = dict.fromkeys((outcome.template, outcome.model) for outcome in outcomes)
    totals += [_suite(root, p, [one for one in outcomes if (one.template, one.model) == p]) for p in places]
    for number, label in enumerate(("tests", "failures", "errors")):
        root.set(label, str(sum(total[number] for total in totals)))
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    return path


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _suite(root: ElementTree.Element, place: tuple[str, str], outcomes: Sequence[Outcome]) -> tuple[int, int, int]:
    name = _clean(f"{place[0]} × {place[1]}")
    errors = sum(one.error is not None for one in outcomes)
    failures = sum(not one.passed for one in outcomes) - errors
    seconds = sum(one.seconds for one in outcomes)
    suite = ElementTree.SubElement(
        root, "testsuite",
        {"name": name, "tests": str(len(outcomes)), "failures": str(failures), "errors": str(errors),
         "skipped": "0", "time": f"{seconds:.3f}"},
    )  # fmt: skip
    for one in outcomes:
        title = f"{one.case} {one.description}".strip()
        attributes = {"name": _clean(title), "classname": name, "time": f"{one.seconds:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", attributes)
        if one.error is not None:
            ElementTree.SubElement(case, "error", {"message": _clean(one.error), "type": "no answer"})
        elif not one.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": _clean(one.why), "type": "assertion"})
            failure.text = _clean(f"{one.why}\n\nanswer:\n{one.output}")
    return len(outcomes), failures, errors


def _static_suite(root: ElementTree.Element, report: StaticReport) -> tuple[int, int, int]:
    """The static checks of one template with one model; one that does not apply is skipped."""
    name = _clean(f"static: {report.template} × {report.model}")
    found = list(report.status())
    failures = sum(state == "error" for _, state in found)
    skipped = sum(state == "skipped" for _, state in found)
    suite = ElementTree.SubElement(
        root, "testsuite",
        {"name": name, "tests": str(len(found)), "failures": str(failures), "errors": "0", "skipped": str(skipped),
         "time": "0"},
    )  # fmt: skip
    for check, state in found:
        case = ElementTree.SubElement(
            suite, "testcase", {"name": f"{check.id}: {check.title}", "classname": name, "time": "0"}
        )
        if state == "error":
            issues = [issue for issue in report.errors if issue.check == check.id]
            words = "\n".join(f"{issue.message} {issue.case or ''}".strip() for issue in issues)
            failure = ElementTree.SubElement(case, "failure", {"message": _clean(issues[0].message), "type": check.id})
            failure.text = _clean(words)
        elif state == "skipped":
            ElementTree.SubElement(case, "skipped")
    return len(found), failures, 0
