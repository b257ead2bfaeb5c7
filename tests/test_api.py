"""llmkit from Python: the same runner and errors as the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llmkit
from llmkit import api
from llmkit.errors import DataError, LlmkitError, RecipeError
from llmkit.recipe import dump
from llmkit.stages import STAGES

ROOT = Path(__file__).parent.parent
TOYS = Path(__file__).parent / "toys"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> api.Stage:
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.setitem(STAGES, "toy", "toy_stage")
    monkeypatch.chdir(tmp_path)
    return api.stage("toy")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: toy\noutput_dir: out\ntracking: {enabled: false}\n")
    return path


def test_the_stages_are_attributes_and_complete_in_a_notebook() -> None:
    names = [stage.replace("-", "_") for stage in STAGES]
    assert set(names) <= set(dir(llmkit))
    for name in names:
        stage = getattr(llmkit, name)
        assert stage.__name__ == name
        assert "overrides" in stage.__doc__
        assert getattr(llmkit, name) is stage
        assert getattr(api, name) is stage
    with pytest.raises(AttributeError, match="the stages are sft"):
        _ = llmkit.sftt  # type: ignore[attr-defined]


def test_every_stage_has_a_type_for_editors() -> None:
    """The names under TYPE_CHECKING, which type checkers and notebooks read, are those of STAGES."""
    text = (ROOT / "llmkit" / "__init__.py").read_text()
    for name in (stage.replace("-", "_") for stage in STAGES):
        assert f"from llmkit.api import {name} as {name}" in text
        assert api.__annotations__[name] == "Stage"


def test_version_is_the_package_version() -> None:
    assert llmkit.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_importing_llmkit_is_light() -> None:
    code = "import json, sys, llmkit; llmkit.sft; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    modules = set(json.loads(done.stdout))
    assert modules & {"torch", "transformers", "mlflow", "datasets", "pandas", "numpy"} == set()


def test_a_path_with_overrides(toy: api.Stage, recipe: Path, tmp_path: Path) -> None:
    result = toy(recipe, {"steps": 2})
    assert result.metrics["steps"] == 2
    assert result.output_dir == tmp_path / "out"
    assert toy(str(recipe), ["steps=4"], output_dir="2025").output_dir == tmp_path / "2025"


def test_a_mapping_and_a_typed_recipe(toy: api.Stage, tmp_path: Path) -> None:
    from toy_stage import Recipe

    given = {"name": "toy", "tracking": {"enabled": False}}
    assert toy(given, output_dir=tmp_path / "a").metrics["steps"] == 3
    typed = Recipe(name="toy", output_dir="b", steps=1, tracking={"enabled": False})  # type: ignore[arg-type]
    assert toy(typed).metrics["steps"] == 1
    assert toy(typed, {"steps": 2}, output_dir="c").metrics["steps"] == 2
    assert typed.steps == 1


def test_the_same_recipe_by_all_ways(toy: api.Stage, recipe: Path) -> None:
    from toy_stage import Recipe

    keys = {"name": "toy", "output_dir": "out", "tracking": {"enabled": False}}
    ways = [recipe, str(recipe), keys, Recipe(**keys)]  # type: ignore[arg-type]
    texts = {dump(api.resolve("toy", way, {"steps": 5})) for way in ways}
    assert len(texts) == 1


def test_another_stages_recipe_is_refused(toy: api.Stage) -> None:
    from toy_stage import Recipe

    with pytest.raises(TypeError, match=r"llmkit\.sft wants a llmkit\.stages\.sft\.Recipe, not a toy_stage\.Recipe"):
        llmkit.sft(Recipe(name="toy"))


def test_errors_are_llmkits_and_nothing_exits(toy: api.Stage, recipe: Path) -> None:
    with pytest.raises(RecipeError, match="stepps"):
        toy(recipe, {"stepps": 2})
    with pytest.raises(RecipeError):
        toy("none.yaml")
    with pytest.raises(DataError, match="rows 1, 2 and 3"):
        toy(recipe, {"end": "data"})
    with pytest.raises(LlmkitError):
        llmkit.sft({"name": "x"})


def test_resume_never(toy: api.Stage, recipe: Path, tmp_path: Path) -> None:
    toy(recipe)
    toy(recipe, {"steps": 5}, resume="never")
    assert (tmp_path / "out.1" / "result.json").is_file()


def test_a_bug_keeps_its_own_class_and_says_where_the_traceback_is(toy: api.Stage, recipe: Path) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        toy(recipe, {"end": "bug"})
    assert any("traceback.txt" in note for note in caught.value.__notes__)
