"""Schema, starter recipe and reference, which are made from the settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.recipe import load_recipe
from llmkit.recipe_hints import keys_of
from llmkit.schema import all_schemas, init_recipe, recipe_type, reference, schema
from llmkit.stages import STAGES

DOCS = Path(__file__).resolve().parent.parent / "docs"


# Blocks that a starter recipe names and does not spell out: one may write text in their place, or they are off and have
# keys without a default.
_NOT_IN_A_STARTER = (
    "models", "judge", "data.train", "data.eval", "data.guard.leaks.against", "data.guard.quality.perplexity",
    "model.tokenizer", "model.quantization", "labels", "gold",
)  # fmt: skip


def test_the_committed_reference_is_the_generated_one() -> None:
    committed = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    assert committed == reference(), "run: python -m llmkit.schema > docs/recipe-reference.md"


def test_the_reference_explains_every_key() -> None:
    text = reference()
    for stage in STAGES:
        assert f"### `llmkit {stage}`" in text
        for block, key in keys_of(recipe_type(stage)):
            section = text.split(f"`{block}`", 1)[1] if block else text
            row = next(line for line in section.splitlines() if line.startswith(f"| `{key}` |"))
            assert len(row.split(" | ")[-1].strip(" |")) > 10, f"{block}.{key} is not explained"


@pytest.mark.parametrize("stage", STAGES)
def test_the_starter_recipe_parses_and_names_every_key(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(init_recipe(stage), encoding="utf-8")
    recipe = load_recipe(path, recipe_type(stage))
    assert recipe.name == f"my-{stage}"
    for block, key in keys_of(recipe_type(stage)):
        if block not in _NOT_IN_A_STARTER and not block.startswith(("launch.slurm", "launch.kubernetes")):
            assert re.search(rf"^[ #]*{key}:", init_recipe(stage), re.MULTILINE), f"{block}.{key} is missing"


@pytest.mark.parametrize("stage", STAGES)
def test_every_line_of_the_starter_recipe_can_be_switched_on(stage: str, tmp_path: Path) -> None:
    text = init_recipe(stage)
    for _ in range(
        4
    ):  # a block that is off as a whole has its keys behind a second `#`, its blocks theirs behind a third
        text = re.sub(r"^( *)# ( *(?:# )?[a-z_0-9]+:(?: |$))", r"\1\2", text, flags=re.MULTILINE)
        text = re.sub(r"^( *)# ( *# )", r"\1\2", text, flags=re.MULTILINE)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    on = load_recipe(path, recipe_type(stage), [f"output_dir=runs/my-{stage}"])
    path.write_text(init_recipe(stage), encoding="utf-8")
    optional = [
        key
        for key in ("adapter", "data.guard", "fsdp")
        if re.search(rf"^ *# {key.split('.')[-1]}:$", init_recipe(stage), re.M)
    ]
    off = load_recipe(
        path, recipe_type(stage), [f"{key}={{}}" for key in optional if stage != "lora" or key != "adapter"]
    )
    assert on == off
    assert len(on.tracking.model_fields_set) == len(type(on.tracking).model_fields)


def test_schemas_are_json_and_forbid_unknown_keys() -> None:
    schemas = all_schemas()
    assert list(schemas) == list(STAGES)
    assert json.loads(json.dumps(schemas)) == schemas
    for stage, found in schemas.items():
        assert found["title"] == f"llmkit {stage} recipe"
        special = {
            "prompt-test": ["templates", "models", "cases"], "embed": ["input", "model"],
            "label": ["input", "models", "templates"],
        }  # fmt: skip
        required = special.get(stage, ["model", "data"])
        assert found["required"] == ["name", *required]
        blocks = [found, *found["$defs"].values()]
        assert len(blocks) >= 8
        assert all(block["additionalProperties"] is False for block in blocks)
        assert all("description" in field for block in blocks for field in block["properties"].values())


def test_shipped_recipes_agree_with_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema comes with the train extra (mlflow, ray)")
    recipes = sorted((DOCS.parent / "recipes").glob("*/*.yaml"))
    assert len(recipes) >= 22
    for path in recipes:
        text = re.sub(r"(?<=[ :])(\d+)e-(\d+)", r"\1.0e-\2", path.read_text(encoding="utf-8"))  # for YAML 1.1
        jsonschema.Draft202012Validator(schema(path.parent.name)).validate(yaml.safe_load(text))
    wrong: dict[str, Any] = {
        "name": "x",
        "model": {"name_or_path": "m", "dtype": "bf16"},
        "data": {"train": "t"},
        "z": 1,
    }
    found = list(jsonschema.Draft202012Validator(schema("sft")).iter_errors(wrong))
    assert len(found) == 2
