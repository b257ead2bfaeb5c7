"""`llmkit plan` on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAVY = (
    "accelerate",
    "datasets",
    "deepspeed",
    "matplotlib",
    "mlflow",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "torch",
    "transformers",
)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: t\nmodel: {{name_or_path: {tiny_llama}}}\ndata: {{train: rows.jsonl, max_length: 64}}\n")
    return path


def test_a_plan(recipe: Path, run_llmkit: Callable[..., Any]) -> None:
    done = run_llmkit("plan", "recipe.yaml")
    assert done.code == 0, done.stderr
    assert "fits       yes" in done.stdout
    assert "the recipe's own" in done.stdout


def test_json_and_exit_code_5(recipe: Path, run_llmkit: Callable[..., Any], tmp_path: Path) -> None:
    small = tmp_path / ".llmkit" / "devices.yaml"
    small.parent.mkdir()
    small.write_text("tiny: {memory_gib: 0.1}\n")
    done = run_llmkit("plan", "recipe.yaml", "--device", "tiny", "--processes", "2", "--json")
    assert done.code == 5
    found = done.json()
    assert (found["fits"], found["processes"], found["device"]["name"]) == (False, 2, "tiny")
    assert run_llmkit("plan", "recipe.yaml", "--device", "a100-40g").code == 0


def test_nothing_heavy_is_loaded(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom llmkit.cli import main\ncode = main(['plan', 'recipe.yaml', '--device', 't4'])\n"
        "print(json.dumps([code, sorted({m.partition('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    exit_code, modules = json.loads(done.stdout.splitlines()[-1])
    assert exit_code == 0
    assert set(modules) & set(HEAVY) == set()


@pytest.mark.parametrize(
    ("keys", "stage"),
    [((), "sft"), (("adapter.r=4",), "lora"), (("data.format=text",), "cpt")],
)
def test_the_stage_is_told_from_the_recipe(
    keys: tuple[str, ...], stage: str, recipe: Path, run_llmkit: Callable[..., Any]
) -> None:
    if stage != "sft":
        block, _, value = keys[0].partition(".")
        key, _, value = value.partition("=")
        text = recipe.read_text()
        recipe.write_text(
            text.replace("max_length", f"{key}: {value}, max_length")
            if block == "data"
            else f"{text}{block}: {{{key}: {value}}}\n"
        )
    done = run_llmkit("plan", "recipe.yaml", "--json")
    assert done.json()["stage"] == stage, done.stderr


def test_licences_of_model_and_data_are_shown(recipe: Path, run_llmkit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    done = run_llmkit("plan", "recipe.yaml", "data.guard.allow_licenses=[MIT]")
    assert "rows.jsonl: MIT (says " in done.stdout
    assert "unknown: NOT in data.guard.allow_licenses" in done.stdout  # the model has no card
    shown = run_llmkit("plan", "recipe.yaml", "--json").json()["licences"]
    assert [found["license"] for found in shown] == ["unknown", "MIT"]


def test_what_is_wrong_is_said(recipe: Path, run_llmkit: Callable[..., Any]) -> None:
    assert "Did you mean h100-80g" in run_llmkit("plan", "recipe.yaml", "--device", "H100").stderr
    done = run_llmkit("plan", "recipe.yaml", "train.max_stepps=3")
    assert done.code == 2
    assert "did you mean" in done.stderr.lower()
    done = run_llmkit("plan", "recipe.yaml", "--stage", "nothing")
    assert (done.code, "there is no stage" in done.stderr) == (2, True)
    assert run_llmkit("plan", "recipe.yaml", "data.train=none.jsonl").code == 3
    assert run_llmkit("plan", "recipe.yaml", "model.name_or_path=nowhere/at/all").code == 6
