"""``llmkit prompt-test`` as a whole on a tiny model: what is generated, kept, compared, reported, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmkit
from llmkit.context import Result, RunContext, StopFlag
from llmkit.errors import DataError, GateError, MissingError, RecipeError, StoppedEarly, UsageError
from llmkit.progress import silent
from llmkit.prompting import smoke
from llmkit.recipe import parse
from llmkit.stages import prompt_test
from llmkit.tracking import NullTracker

TEMPLATE = """---
name: {name}
version: {version}
language: en
variables:
  - {{name: q}}
  - {{name: label, required: false}}
answer: "{{{{ label }}}}"
---
{{% user %}}{text}{{{{ q }}}}{{% enduser %}}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write(tmp_path, name)
    rows = [{"q": "Hi", "label": "yes"}, {"q": "How many legs?", "label": "eight"}]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write(folder: Path, name: str, version: int = 1, text: str = "") -> None:
    (folder / f"{name}.jinja").write_text(TEMPLATE.format(name=name, version=version, text=text))


def recipe(model: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "t", "templates": ["a.jinja", "b.jinja"], "models": {"name_or_path": str(model), "name": "tiny", "device": "cpu"},
        "cases": "cases.jsonl", "generation": {"max_new_tokens": 4, "batch_size": 2}, "tracking": {"enabled": False},
    } | more  # fmt: skip


PASSES = [{"type": "not-contains", "value": "wholly impossible text"}]
FAILS = [{"type": "contains", "value": "wholly impossible text"}]


def test_a_run_that_passes(work: Path, tiny_llama: Path) -> None:
    result = llmkit.prompt_test(recipe(tiny_llama, default_assert=PASSES))
    assert result.status == "done"
    assert result.metrics["pass_rate"] == 1.0
    assert result.metrics["cases"] == 4
    assert result.metrics["pass_rate/template/a_1"] == 1.0
    assert result.metrics["static_errors"] == 0
    folder = work / "runs" / "t"
    assert set(result.artifacts) == {"report", "page", "tokens", "static", "table", "junit", "results"}
    assert all((folder / file).is_file() for file in result.artifacts.values())
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(row["template"], row["variables"]["q"], row["expected"]) for row in rows] == [
        ("a@1", "Hi", "yes"), ("a@1", "How many legs?", "eight"), ("b@1", "Hi", "yes"), ("b@1", "How many legs?", "eight"),
    ]  # fmt: skip
    assert [row["prompt"] for row in rows[:1]] == [[{"role": "user", "content": "Hi"}]]
    table = json.loads((folder / "results_table.json").read_text())
    assert len(table["data"]) == 4
    assert len(table["columns"]) == len(table["data"][0])
    assert llmkit.prompt_test(recipe(tiny_llama, default_assert=PASSES)) == result, "a finished run is not run again"


def test_equal_prompts_are_asked_once(work: Path, tiny_llama: Path) -> None:
    llmkit.prompt_test(recipe(tiny_llama, default_assert=PASSES))
    assert len((work / "runs/t/answers.jsonl").read_text().splitlines()) == 2, "both templates make the same prompts"


def test_below_a_threshold(work: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(tiny_llama, default_assert=FAILS, thresholds={"overall": 0.5, "template": {"a": 1.0}})
    with pytest.raises(GateError) as raised:
        llmkit.prompt_test(given)
    said = str(raised.value)
    assert "0% (0/4) of all cases passed, thresholds.overall is 50%" in said
    assert "0% (0/2) passed with template a@1, thresholds.template is 100%" in said
    assert str(work / "runs/t/report.html") in said
    result = Result.from_json((work / "runs/t/result.json").read_text())
    assert (result.status, result.exit_code) == ("failed", 4)
    assert result.metrics["pass_rate"] == 0.0
    assert result.artifacts["junit"] == "junit.xml"

    # the same again asks nothing, and loads no model
    monkeypatch.setattr(smoke, "open_engine", None)
    with pytest.raises(GateError):
        llmkit.prompt_test(given)
    assert not (work / "runs/t.1").exists()


def test_a_changed_template_is_compared_with_the_run_before(work: Path, tiny_llama: Path) -> None:
    write(work, "b", 1, "Say: ")
    llmkit.prompt_test(recipe(tiny_llama, default_assert=PASSES))
    write(work, "b", 2, "Tell: ")
    given = recipe(
        tiny_llama, default_assert=[*PASSES, {"type": "python", "value": "'Tell' not in str(context['prompt'])"}]
    )
    with pytest.raises(GateError):
        llmkit.prompt_test(given)
    result = Result.from_json((work / "runs/t/result.json").read_text())
    assert (result.metrics["broke"], result.metrics["fixed"], result.metrics["mcnemar_p"]) == (2, 0, 0.5)
    report = (work / "runs/t/report.md").read_text()
    assert "100% → 50% on 4 cases in common, 2 broke, 0 got fixed" in report
    assert "2 answers were taken over" in report, "those of template a, which did not change"
    assert (work / "runs/t.1/results.jsonl").is_file()
    kept = [json.loads(line) for line in (work / "runs/t/answers.jsonl").read_text().splitlines()]
    assert len(kept) == 4, "the file of the new run is complete"

    write(work, "b", 1, "Say: ")
    back = llmkit.prompt_test(given)
    assert (back.metrics["broke"], back.metrics["fixed"]) == (0, 2)
    named = llmkit.prompt_test(given, {"compare_to": str(work / "runs/t.1")}, output_dir=work / "other")
    assert (named.metrics["broke"], named.metrics["fixed"]) == (0, 0)
    with pytest.raises(MissingError, match=r"compare_to: none has no results\.jsonl"):
        llmkit.prompt_test(given, {"compare_to": "none"}, output_dir=work / "third")


def test_the_folder_of_another_stage_is_left_alone(work: Path, tiny_llama: Path) -> None:
    llmkit.prompt_test(recipe(tiny_llama, dynamic=False))
    run = work / "runs/t/run.json"
    run.write_text(run.read_text().replace('"prompt-test"', '"lora"'))
    with pytest.raises(UsageError, match="its stage is lora, not prompt-test"):
        llmkit.prompt_test(recipe(tiny_llama))
    with pytest.raises(UsageError, match="a prompt test has no checkpoints"):
        llmkit.prompt_test(recipe(tiny_llama), output_dir="other", resume=str(work))


def test_two_versions_in_one_recipe_are_set_beside_each_other(work: Path, tiny_llama: Path) -> None:
    write(work, "c", 2, "Please say: ")
    (work / "c.jinja").write_text((work / "c.jinja").read_text().replace("name: c", "name: a"))
    llmkit.prompt_test(recipe(tiny_llama, templates=["a.jinja", "c.jinja"], default_assert=PASSES))
    report = (work / "runs/t/report.md").read_text()
    assert "a@1 → a@2: 2 of 2 prompts changed" in report
    assert "+Please say: Hi" in report


def test_a_stop_keeps_what_was_answered(work: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(work, "b", 1, "Say: ")
    given = parse(
        recipe(tiny_llama, default_assert=PASSES, generation={"max_new_tokens": 2, "batch_size": 1}), prompt_test.Recipe
    )
    stop = StopFlag()
    before = smoke.Answers.add

    def add(self: smoke.Answers, *args: Any) -> None:
        before(self, *args)
        stop.request("SIGTERM")

    folder = work / "out"
    folder.mkdir()
    with silent() as progress:
        ctx = RunContext(folder, NullTracker(), progress, stop)
        monkeypatch.setattr(smoke.Answers, "add", add)
        with pytest.raises(StoppedEarly, match=r"Stopped by SIGTERM: 1 of 4 answers are kept"):
            prompt_test.run(given, ctx)
        monkeypatch.setattr(smoke.Answers, "add", before)
        with (folder / "answers.jsonl").open("a") as file:
            file.write('{"key": "cut by a ki')
        result = prompt_test.run(given, RunContext(folder, NullTracker(), progress, StopFlag()))
    assert result.metrics["cases"] == 4
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 5, "four answers, and the line that a kill cut"


def test_a_static_error_ends_the_run_before_anything_is_generated(work: Path, tiny_llama: Path) -> None:
    import shutil

    model = work / "model"
    shutil.copytree(tiny_llama, model)
    file = model / "chat_template.jinja"
    assert file.is_file()
    file.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}")
    with pytest.raises(GateError, match=r"nothing was generated[\s\S]*a@1 with tiny"):
        llmkit.prompt_test(recipe(model, default_assert=PASSES))
    assert not (work / "runs/t/answers.jsonl").exists()
    assert "stop-token" in (work / "runs/t/report.md").read_text()
    result = llmkit.prompt_test(recipe(model, default_assert=PASSES, static=False))
    assert result.metrics["pass_rate"] == 1.0


def test_static_checks_alone(work: Path, tiny_llama: Path) -> None:
    result = llmkit.prompt_test(recipe(tiny_llama, dynamic=False, max_length=64, prices={"input": 1.0}))
    assert "pass_rate" not in result.metrics
    assert result.metrics["prompt_tokens_max"] > 1
    assert result.metrics["cost"] > 0
    assert not (work / "runs/t/results.jsonl").exists()
    with pytest.raises(GateError, match="longer than max_length 8"):
        llmkit.prompt_test(recipe(tiny_llama, dynamic=False, max_length=8))


def test_the_models_own_template_and_cases_for_some_templates_only(work: Path, tiny_llama: Path) -> None:
    cases = [
        {"vars": {"q": "1"}, "templates": ["a"]},
        {"vars": {"prompt": "2", "system": "Be kind"}, "templates": ["chat_template"]},
        {"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}], "__templates": "chat_template",
         "assert": [{"type": "not-equals", "value": "{{ expected }}"}]},
    ]  # fmt: skip
    llmkit.prompt_test(recipe(tiny_llama, templates=["a.jinja", "chat_template"], cases=cases))
    rows = [json.loads(line) for line in (work / "runs/t/results.jsonl").read_text().splitlines()]
    assert [(row["template"], row["prompt"][-1]["content"], row["expected"]) for row in rows] == [
        ("a@1", "1", None), ("chat template", "2", None), ("chat template", "3", "4"),
    ]  # fmt: skip
    assert rows[1]["prompt"][0] == {"role": "system", "content": "Be kind"}


def test_what_does_not_fit_together_is_told_at_once(work: Path, tiny_llama: Path) -> None:
    cases = [{"vars": {}}, {"vars": {"q": "x"}, "templates": ["nowhere"]}, {"vars": {"q": "x"}, "assert": [
        {"type": "contains", "value": "{{ nothing }}"}, {"type": "python", "value": "none.py:f"}]}]  # fmt: skip
    with pytest.raises(DataError) as raised:
        llmkit.prompt_test(recipe(tiny_llama, templates=["a.jinja", "chat_template"], cases=cases))
    said = str(raised.value)
    assert "case 2: templates: there is no template nowhere (there are a@1, chat template)" in said
    assert "a@1, case 1: a@1: `q` is missing" in said
    assert "'nothing' is undefined" in said
    assert "chat_template takes a case's `messages`, or its `prompt`" in said


@pytest.mark.parametrize(
    ("more", "kind", "said"),
    [
        ({"templates": ["none.jinja", "a.jinja"]}, RecipeError, "none.jinja: cannot be read"),
        ({"cases": "none.jsonl"}, DataError, "none.jsonl does not exist"),
        ({"thresholds": {"template": {"aa": 1.0}}}, UsageError, "there is no template aa"),
        ({"thresholds": {"model": {"tony": 1.0}}}, UsageError, "there is no model tony. Did you mean tiny?"),
        ({"models": "no/such/folder/here"}, MissingError, "no folder no/such/folder/here"),
        ({"models": {"base_url": "http://127.0.0.1:9", "model": "m", "api_key_env": "LLMKIT_NO_KEY"}, "static": False},
         MissingError, "LLMKIT_NO_KEY"),
    ],
)  # fmt: skip
def test_what_is_not_there(
    work: Path, tiny_llama: Path, more: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        llmkit.prompt_test(recipe(tiny_llama, **more))


def test_mistakes_of_the_recipe(tiny_llama: Path) -> None:
    wrong = recipe(
        tiny_llama, templates=["a", "a"], tests="x", default_assert=[{"type": "contians"}, {"type": "similar", "value": "x"}],
        cases=[{"vars": {}, "assert": [{"type": "llm-rubric", "value": "nice"}]}, {"vars": 5}], dynamic=False, static=False,
        launch={"processes": 2}, thresholds={"overall": 1.5},
    )  # fmt: skip
    with pytest.raises(RecipeError) as raised:
        parse(wrong, prompt_test.Recipe)
    found = {problem.key: f"{problem.message} {problem.hint}" for problem in raised.value.problems}
    assert set(found) == {
        "templates.1", "tests", "default_assert.0.type", "embedding_model", "judge", "cases.1.vars", "dynamic",
        "launch.processes", "thresholds.overall",
    }  # fmt: skip
    assert "`cases`" in found["tests"]


def test_an_output_schema_is_asserted(work: Path, tiny_llama: Path) -> None:
    text = (
        (work / "a.jinja").read_text().replace("variables:", "output_schema: {type: object, required: [x]}\nvariables:")
    )
    (work / "a.jinja").write_text(text)
    with pytest.raises(GateError):
        llmkit.prompt_test(recipe(tiny_llama, templates="a.jinja", static=False))
    rows = [json.loads(line) for line in (work / "runs/t/results.jsonl").read_text().splitlines()]
    assert {grade["type"] for row in rows for grade in row["grades"]} == {"is-json"}


def test_a_judge_is_asked_once_for_each_verdict(work: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(
        tiny_llama,
        templates="a.jinja",
        judge=str(tiny_llama),
        default_assert=[{"type": "llm-rubric", "value": "is kind"}],
    )
    with pytest.raises(GateError):
        llmkit.prompt_test(given)
    assert "the judge gave no verdict" in (work / "runs/t/report.md").read_text(), "a random model judges nothing"
    monkeypatch.setattr(smoke, "open_engine", None)
    with pytest.raises(GateError):
        llmkit.prompt_test(given)


def test_show_prints_a_case_token_by_token(work: Path, tiny_llama: Path) -> None:
    given = parse(recipe(tiny_llama), prompt_test.Recipe)
    text = prompt_test.show(given, 2)
    assert "a@1 · tiny" in text
    assert "b@1 · tiny" in text
    assert "<|im_start|>" in text
    assert "How many legs?" in text
    assert "⟦eight<|im_end|>" in text, "what would be learned"
    with pytest.raises(UsageError, match=r"--show 3: there are 2 cases"):
        prompt_test.show(given, 3)
