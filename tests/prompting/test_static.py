"""The static checks on one small tokenizer: each finding, its case, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmkit.data.render import IGNORED
from llmkit.data.rows import Conversation
from llmkit.prompting.report import CHECKS, Case, Prices, StaticReport, Subject
from llmkit.prompting.static import check_static, compare_versions, open_subject
from llmkit.prompting.template import PromptTemplate, load_template, shipped

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight."},
    {"role": "user", "content": "And a fox?"},
    {"role": "assistant", "content": "Four."},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CASES = [Case("a", messages=TALK), Case("b", messages=TALK[1:2])]


@pytest.fixture(scope="module")
def subject(tiny_llama: Path) -> Subject:
    return open_subject(str(tiny_llama), name="tiny")


def with_template(subject: Subject, template: str, **changes: Any) -> Subject:
    return Subject("tiny", subject.tokenizer, chat_template=template, stop_ids=subject.stop_ids, **changes)


def found(report: StaticReport, severity: str = "error") -> list[str]:
    return [issue.check for issue in report.issues if issue.severity == severity]


def test_a_sound_template_has_no_issue(subject: Subject) -> None:
    report = check_static(None, subject, CASES, max_length=100)
    assert (report.errors, report.warnings) == ([], [])
    assert report.passed
    known, unknown = report.tokens
    assert (known.case, unknown.case) == ("a", "b")
    assert known.answer > 0
    assert unknown.answer == 0, "an answer that is not known is not counted"
    assert {check.id for check, _ in report.status()} == {check.id for check in CHECKS}
    json.dumps(report.to_dict())


def test_what_max_length_cuts_is_said_by_case(subject: Subject) -> None:
    longest = check_static(None, subject, CASES).tokens[0].total
    report = check_static(None, subject, CASES, max_length=longest)
    assert report.passed
    report = check_static(None, subject, CASES, max_length=longest - 2)
    (issue,) = report.errors
    assert (issue.check, issue.case, issue.cases) == ("max-length", "a", 1)
    assert report.tokens[0].cut == 2


def test_cost_is_that_of_all_cases(subject: Subject) -> None:
    report = check_static(None, subject, CASES, prices=Prices(input=2.0, output=10.0))
    prompts, answers = sum(t.prompt for t in report.tokens), sum(t.answer for t in report.tokens)
    assert report.cost == pytest.approx((2 * prompts + 10 * answers) / 1e6)
    assert check_static(None, subject, CASES).cost is None


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("assistant\n' }}{% endif %}", "assistant' }}{% endif %}", "newlines"),
        ("assistant\n' }}{% endif %}", "bot\n' }}{% endif %}", "generation-prompt"),
        ("{{ '<|im_start|>assistant\n' }}{% endif %}", "{% endif %}", "generation-prompt"),
        ("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}", "thinking"),
        ("m.content + '<|im_end|>\n'", "m.content + '\n'", "stop-token"),
        ("m.content +", "m.content[:4] +", "content"),
        ("{% for m in messages %}", "{% for m in messages[-3:] %}", "prefix"),
        ("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}", "system"),
        ("{% for m in messages %}", "{{ raise_exception('no') }}{% for m in messages %}", "renders"),
        ("{% for m in messages %}", "{% for m in messages", "renders"),
    ],
)
def test_a_broken_template_is_found(subject: Subject, old: str, new: str, check: str) -> None:
    assert old in CHATML
    report = check_static(None, with_template(subject, CHATML.replace(old, new)), CASES)
    severity = "warning" if check == "newlines" else "error"
    assert check in found(report, severity), report.issues


def test_tools_that_the_template_drops(subject: Subject) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"properties": {"word": {}}}}}
    report = check_static(None, subject, [Case("a", messages=TALK, tools=[tool]), CASES[1]])
    assert found(report) == ["tools"]
    kept = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    assert not check_static(None, with_template(subject, kept), [Case("a", messages=TALK, tools=[tool])]).errors
    cut = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + CHATML
    report = check_static(None, with_template(subject, cut), [Case("a", messages=TALK, tools=[tool])])
    assert [(issue.check, issue.detail) for issue in report.errors] == [("tools", "word")]


def test_special_tokens_that_somebody_typed(subject: Subject) -> None:
    case = Case("a", messages=[{"role": "user", "content": "what is <|im_end|> for?"}], answer="To end a turn.")
    report = check_static(None, subject, [case, CASES[0]])
    assert not report.errors, "llmkit keeps them as text"
    assert [(issue.check, issue.cases) for issue in report.warnings] == [("literal-specials", 1)]


def test_a_model_that_stops_elsewhere(subject: Subject) -> None:
    other = Subject("tiny", subject.tokenizer, stop_ids=(0,))
    assert found(check_static(None, other, CASES), "warning") == ["model-stop"]


def test_generation_marks_have_to_agree(subject: Subject) -> None:
    right = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m.role }}@{{ '\n' }}#{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}!{{ '<|im_end|>' }}?{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    plain = right.translate(str.maketrans("", "", "@#!?"))
    assert not check_static(None, with_template(subject, plain), CASES).errors
    without_stop = right.replace("!", "{% endgeneration %}").replace("?{% endgeneration %}", "")
    wrong = without_stop.translate(str.maketrans("", "", "@#!?"))
    report = check_static(None, with_template(subject, wrong), CASES)
    assert [issue.check for issue in report.errors] == ["generation-marks"]
    assert "without their stop token" in report.errors[0].message


def test_another_pipelines_mask_is_held_against_the_turns(subject: Subject) -> None:
    from llmkit.data.render import Renderer

    renderer = Renderer(subject.tokenizer, stop_ids=subject.stop_ids)

    def train(row: Conversation, shift: int) -> tuple[Sequence[int], Sequence[int]]:
        made: Any = renderer.encode([row])[0]
        ids, labels = list(map(int, made.input_ids)), list(map(int, made.labels))
        learned = [label != IGNORED for label in labels]
        moved = learned[shift:] + [False] * shift
        return ids, [i if flag else IGNORED for i, flag in zip(ids, moved, strict=True)]

    def checked(shift: int) -> list[str]:
        pipeline = Subject("tiny", subject.tokenizer, stop_ids=subject.stop_ids, train=lambda row: train(row, shift))
        return found(check_static(None, pipeline, CASES))

    assert checked(0) == []
    assert checked(1) == ["mask"]


def test_thinking_that_is_dropped(subject: Subject) -> None:
    talk = [*TALK[1:4], {"role": "assistant", "content": "<think>\nA fox is a dog.\n</think>\n\nFour."}]
    bare = CHATML.replace("m.content +", "m.content.split('</think>')[-1].strip() +")
    cases = [Case("a", messages=talk)]
    assert not check_static(None, subject, cases).issues[:0]
    assert not check_static(None, subject, cases).warnings
    assert found(check_static(None, with_template(subject, bare), cases), "warning") == ["thinking"]


def test_demonstrations_need_no_prefixes_before_the_answer(subject: Subject) -> None:
    """A template that rewrites earlier turns serves a prompt with demonstrations, of which only the answer is learned."""
    last = "(messages | length) - 1"
    drops = CHATML.replace("m.content +", f"(m.content if loop.index0 == {last} or m.role != 'assistant' else '…') +")
    template = load_template("en-query-rewriting")
    case = Case("a", {"query": "red shoos", "category": "shoes", "rewrite": "red shoes"})
    report = check_static(template, with_template(subject, drops), [case])
    assert "renders" not in found(report), report.issues


# ---- templates of prompts ----


@pytest.mark.parametrize("name", [name for name in shipped() if name.endswith(("rewriting", "extraction"))])
def test_shipped_templates_pass(subject: Subject, name: str) -> None:
    template = load_template(name)
    demonstrations = template.demonstrations()
    if demonstrations:
        values = dict(demonstrations.examples[0])
    else:
        values = {"title": "x", "attributes": dict.fromkeys(template.output_schema["required"])}  # type: ignore[index]
    report = check_static(template, subject, [Case("a", values)], max_length=4000)
    assert (report.errors, report.warnings) == ([], [])
    assert report.tokens[0].answer > 0


def parse(body: str, *lines: str) -> PromptTemplate:
    return PromptTemplate.parse("\n".join(["---", "name: t", *lines, "---", body]))


def test_variables_of_cases_and_templates(subject: Subject) -> None:
    template = parse("Say {{ a }}", "variables: [{name: a}, {name: b, required: false}]")
    report = check_static(template, subject, [Case("1", {"a": "x"}), Case("2", {"c": "x"}), Case("3", {})])
    assert [(i.severity, i.check, i.case, i.cases) for i in report.issues[:2]] == [
        ("error", "variables", "2", 2),
        ("warning", "variables", None, 0),
    ]
    assert [one.case for one in report.tokens] == ["1"]


@pytest.mark.parametrize(("answer", "said"), [("no", "not JSON"), ('{"n": "x"}', "does not follow"), ('{"n": 1}', "")])
def test_right_answers_follow_the_schema(subject: Subject, answer: str, said: str) -> None:
    template = parse("Count", "output_schema: {type: object, properties: {n: {type: integer}}}")
    report = check_static(template, subject, [Case("1", {}, answer=answer)])
    assert [issue.check for issue in report.errors] == (["output-schema"] if said else [])
    assert not said or said in report.errors[0].message


def test_a_text_for_a_base_model(subject: Subject) -> None:
    template = parse("Q: {{ q }}\nA:", "kind: text", "variables: [{name: q}]", 'answer: " {{ a }}"')
    base = open_subject_without_template(subject)
    report = check_static(template, base, [Case("1", {"q": "x", "a": "y"})])
    assert not report.errors, report.issues
    assert report.tokens[0].answer > 0
    assert "prefix" in report.skipped
    chat = check_static(template, subject, [Case("1", {"q": "x", "a": "y"})])
    assert [issue.check for issue in chat.issues if "without the chat template" in issue.message] == ["renders"]


def open_subject_without_template(subject: Subject) -> Subject:
    import copy

    tokenizer: Any = copy.deepcopy(subject.tokenizer)
    tokenizer.chat_template = None
    return Subject("base", tokenizer, stop_ids=subject.stop_ids)


def test_a_chat_without_a_chat_template_is_an_error(subject: Subject) -> None:
    report = check_static(None, open_subject_without_template(subject), CASES)
    assert "renders" in found(report)
    assert any("data.chat_template" in issue.message + issue.detail for issue in report.errors)


def test_a_sequence_to_sequence_model(tiny_t5: Path) -> None:
    front = ("variables: [{name: q}]", 'answer: "{{ a }}"')
    cases = [Case("1", {"q": "x", "a": "y"})]
    t5 = open_subject(str(tiny_t5))
    report = check_static(parse("translate: {{ q }}", "kind: text", *front), t5, cases, max_length=50)
    assert not report.errors, report.issues
    assert report.tokens[0].prompt > report.tokens[0].answer > 0
    report = check_static(parse("translate: {{ q }}", *front), t5, cases)
    assert any("kind: text" in issue.message for issue in report.errors)


def test_versions_are_compared_by_their_prompts(subject: Subject) -> None:
    old = parse("Say {{ a }} please", "variables: [{name: a}]", "version: 1")
    new = parse(
        "{% if a == 'x' %}Do say{% else %}Say{% endif %} {{ a }} please", "variables: [{name: a}]", "version: 2"
    )
    diff = compare_versions(old, new, subject, [Case("1", {"a": "x"}), Case("2", {"a": "y"}), Case("3", {})])
    assert list(diff.diffs) == ["1"]
    assert "-Say x please" in diff.diffs["1"]
    assert "+Do say x please" in diff.diffs["1"]
    assert diff.tokens["1"][1] > diff.tokens["1"][0]
    assert list(diff.problems) == ["3"]
    assert diff.text().startswith("t@1 → t@2: 1 of 2 prompts changed")
