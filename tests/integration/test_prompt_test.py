"""The shipped shop templates with the demo model, from the command line and from Python: measurement 3 of the issue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai_server import serve

import llmkit
from llmkit.errors import GateError
from llmkit.inference.generate import open_generator

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "prompt-test" / "demo.yaml"


def test_the_demo_from_the_command_line(run_llmkit: Callable[..., Any], demo_model: Path, tmp_path: Path) -> None:
    from junitparser import JUnitXml
    from mlflow.tracking import MlflowClient

    command = ["prompt-test", RECIPE, f"models={demo_model}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    first = run_llmkit(*command, "--json", timeout=800)
    assert first.code == 0, first.stderr
    result = first.json()
    assert result["metrics"]["cases"] == 6
    assert result["metrics"]["pass_rate"] >= 0.3
    assert result["metrics"]["static_errors"] == 0
    assert "category-matching@1" in first.stderr
    folder = tmp_path / "runs" / "prompt-test-demo"
    assert {file.name for file in folder.iterdir()} >= set(result["artifacts"].values()) | {"answers.jsonl"}
    suites = list(JUnitXml.fromfile(str(folder / "junit.xml")))
    assert sum(suite.tests for suite in suites if not suite.name.startswith("static")) == 6

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(result["run_id"])
    assert run.data.metrics["pass_rate"] == pytest.approx(result["metrics"]["pass_rate"])
    assert "results_table.json" in run.data.tags["mlflow.loggedArtifacts"]
    names = {file.path for file in client.list_artifacts(result["run_id"])}
    assert names >= {"report.html", "report.md", "junit.xml", "results.jsonl", "results_table.json", "tokens.html"}

    # A stricter threshold is a new run of the same answers: quick, compared with the first, and it fails.
    second = run_llmkit(*command, "thresholds.overall=1.0", "--json", timeout=800)
    assert second.code == 4, second.stderr
    failed = second.json()
    assert failed["exit_code"] == 4
    assert "thresholds.overall is 100%" in failed["error"]
    assert failed["metrics"]["pass_rate"] == result["metrics"]["pass_rate"]
    assert (failed["metrics"]["broke"], failed["metrics"]["fixed"]) == (0, 0)
    assert "6 answers were taken over" in second.stderr

    shown = run_llmkit(*command, "--show", "3", timeout=800)
    assert shown.code == 0
    assert "⟦Phone accessories<|im_end|>" in shown.stdout


@pytest.mark.timeout(900)
def test_the_shipped_templates_from_python(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six templates in English, Korean and Chinese: checked, and answered with a few tokens each."""
    monkeypatch.chdir(tmp_path)
    keys = {
        "models": str(demo_model), "tracking": {"enabled": False}, "max_length": 2048,
        "generation": {"max_new_tokens": 6}, "thresholds": {"overall": 0.0},
    }  # fmt: skip
    for language in ("en", "ko", "zh"):
        result = llmkit.prompt_test(RECIPE.with_name(f"{language}-ecommerce.yaml"), keys)
        report = (result.output_dir / "report.md").read_text(encoding="utf-8")
        assert result.metrics["static_errors"] == 0, report
        assert result.metrics["errors"] == 0, report
        templates = [name for name in result.metrics if name.startswith("pass_rate/template/")]
        assert len(templates) == 6
    with pytest.raises(GateError) as raised:
        llmkit.prompt_test(RECIPE.with_name("zh-ecommerce.yaml"), keys | {"thresholds": {"overall": 1.0}})
    assert raised.value.metrics["cases"] == 7
    assert raised.value.metrics["broke"] == 0
    assert (tmp_path / "runs/zh-ecommerce" / raised.value.artifacts["page"]).is_file()


def test_a_url_from_the_command_line(run_llmkit: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: url\ntemplates: chat_template\nmodels: {base_url: x, model: tiny}\ngeneration: {max_new_tokens: 4}\n"
        "cases: [{vars: {prompt: Hi}}, {vars: {prompt: How many legs}}]\ndefault_assert: [{type: perplexity, threshold: 1000}]\n"
    )
    with serve(open_generator(tiny_llama, device="cpu")) as server:
        server.failures = [(503, {}), (429, {"Retry-After": "0"})]
        settings = (f"models.base_url={server.url}", f"models.tokenizer={tiny_llama}", "tracking.enabled=false")
        done = run_llmkit("prompt-test", "r.yaml", *settings, "--json")
    assert done.code == 0, done.stderr
    assert done.json()["metrics"]["pass_rate"] == 1.0
    assert done.json()["metrics"]["static_errors"] == 0
    assert len(server.bodies) == 4
