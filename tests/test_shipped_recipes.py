"""Every recipe that is shipped: it parses, keeps to what departs from the defaults, and says whom it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.cli import main
from llmkit.recipe import dump, load_recipe
from llmkit.schema import recipe_type
from llmkit.stages import STAGES

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


def test_the_recipes_were_seen() -> None:
    assert len(RECIPES) >= 22
    assert {path.parent.name for path in RECIPES} - {"deepspeed"} == set(STAGES)
    assert sorted(FOLDER.rglob("*.y*ml")) == RECIPES, "a recipe lies outside recipes/<stage>/"
    families = {"qwen3", "llama3", "gsm8k-demo"}
    assert families <= {path.stem for path in RECIPES if path.parent.name == "lora"}
    assert families <= {path.stem for path in RECIPES if path.parent.name == "sft"}
    assert families | {"from-scratch"} <= {path.stem for path in RECIPES if path.parent.name == "cpt"}
    assert {f"dora-{family}" for family in families} <= {path.stem for path in RECIPES}
    assert {name.split("/")[1][:3] for name in NAMES} >= {"ko-", "zh-", "en-"}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_it_parses_and_is_read_back_the_same(path: Path, tmp_path: Path) -> None:
    kind = recipe_type(path.parent.name)
    recipe = load_recipe(path, kind)
    frozen = tmp_path / "recipe.yaml"
    frozen.write_text(dump(recipe), encoding="utf-8")
    assert load_recipe(frozen, kind) == recipe


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem != "quickstart"], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_it_says_what_for_whom_how_and_on_what(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").split("\nname:")[0].splitlines() if line.startswith("#")]
    said = " ".join(head)
    for word in ("What:", "For whom:", "Run:", "Hardware:"):
        assert word in said, f"{path.name} does not say {word}"
    assert f"llmkit {path.parent.name} recipes/{path.parent.name}/{path.name}" in said


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem != "quickstart"], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_it_holds_only_what_departs_from_the_defaults(path: Path) -> None:
    kind = recipe_type(path.parent.name)
    required: dict[str, Any] = {"name": "x", "model": {"name_or_path": "x"}, "data": {"train": "x"}}
    if path.parent.name == "prompt-test":
        required = {"name": "x", "templates": "x", "models": "x", "cases": "x"}
    if path.parent.name == "embed":
        required = {"name": "x", "model": {"name_or_path": "x"}, "input": {"path": "x"}}
    if path.parent.name == "label":
        required = {"name": "x", "templates": "x", "models": "x", "input": {"path": "x"}}
    frozen = yaml.safe_load(dump(kind.model_validate(required)))
    written = load_recipe(path, kind).model_dump(exclude_unset=True)
    assert _same(written, frozen) == []


def _same(written: dict[str, Any], default: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys that a recipe sets to what they are anyway."""
    found: list[str] = []
    for key, value in written.items():
        other = default.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found += _same(value, other, f"{prefix}{key}.")
        elif key in default and value == other:
            found.append(prefix + key)
    return found


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_dry_run_resolves_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([path.parent.name, str(path), "--dry-run"]) == 0
    recipe = load_recipe(path, recipe_type(path.parent.name))
    said = capfd.readouterr().out
    assert f"name: {recipe.name}" in said
    defaults = {"prompt-test": "batch_size: 8", "embed": "rows_per_shard: 10000", "label": "max_errors: 100"}
    default = defaults.get(path.parent.name, "warmup_ratio: 0.03")
    assert default in said, "a default is not written out"
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing behind"


def test_no_recipe_names_a_machine_or_holds_a_secret() -> None:
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        assert "/home/" not in text
        assert "/root" not in text
        assert "hf_" not in text
