"""What a recipe may hold, told in three ways, all made from the settings: JSON schema, starter recipe, reference.

``python -m llmkit.schema > docs/recipe-reference.md`` writes the reference.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmkit import stages
from llmkit.recipe import Recipe
from llmkit.recipe_errors import describe, field_kinds

# Where a starter recipe departs from the defaults, because a field has none or most people will want to see it.
_STARTER: dict[str, Any] = {
    "model.name_or_path": "models/smollm2-135m-instruct",
    "data.train": "data/train.jsonl",
    "data.eval": {"split": 0.02},
    "data.max_length": 1024,
    "data.packing": True,
    "train.num_train_epochs": 1.0,
    "train.learning_rate": 2e-5,
    "train.per_device_train_batch_size": 8,
    "train.eval_steps": 100,
    "train.save_steps": 100,
}
_STARTER_OF: dict[str, dict[str, Any]] = {
    "lora": {"train.learning_rate": 2e-4, "adapter.r": 16, "adapter.lora_alpha": 32.0},
    "cpt": {"data.train": "data/corpus/*.txt", "data.format": "text"},
    "prompt-test": {
        "templates": "en-query-rewriting",
        "models": "models/smollm2-135m-instruct",
        "cases": "data/cases.jsonl",
        "thresholds.overall": 0.9,
    },
    "label": {
        "models": "Qwen/Qwen3-1.7B",
        "templates": "en-attribute-extraction",
        "input.path": "data/titles.jsonl",
    },
    "embed": {
        "model.name_or_path": "models/all-minilm-l6-v2",
        "input.path": "data/texts.jsonl",
        "embedding.on_too_long": "truncate",
    },
}


def recipe_type(stage: str) -> type[Recipe]:
    """The settings of a stage. Raises KeyError for an unknown one."""
    found: type[Recipe] = stages.load(stage).Recipe
    return found


def schema(stage: str) -> dict[str, Any]:
    """JSON schema (2020-12) of a stage's recipe, for editors: the YAML language server completes and checks by it."""
    found = recipe_type(stage).model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": f"llmkit {stage} recipe"}


def all_schemas() -> dict[str, dict[str, Any]]:
    """JSON schemas by stage."""
    return {stage: schema(stage) for stage in stages.STAGES}


def _meaning(info: FieldInfo) -> str:
    return " ".join((info.description or "").split()).replace("``", "`")


def _about(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().replace("``", "`")


def _default(info: FieldInfo) -> Any:
    if info.is_required():
        return None
    if info.default_factory_takes_validated_data:
        return "runs/<name>"
    return info.get_default(call_default_factory=True)


def _inner(info: FieldInfo) -> type[BaseModel] | None:
    """The settings of a block; None for a field that may be written as plain text too, or that is no block."""
    kinds = [kind for kind in field_kinds(info) if kind.type is not type(None)]
    return kinds[0].model if len(kinds) == 1 else None


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def init_recipe(stage: str) -> str:
    """A commented recipe that parses: what is needed is filled in, the rest stands behind ``#`` with its default."""
    model = recipe_type(stage)
    starter = {"name": f"my-{stage}"} | _STARTER | _STARTER_OF.get(stage, {})
    head = f"""
        # A recipe for `llmkit {stage}`. {_about(model)}
        # Check it:  llmkit {stage} recipe.yaml --dry-run
        # Run it:    llmkit {stage} recipe.yaml [KEY=VALUE ...]
        # A line behind `#` shows the default; remove the `# ` to change it.
        """
    return textwrap.dedent(head).lstrip() + "\n" + "\n".join(_starter_lines(model, starter)).rstrip() + "\n"


_ONE_LINE = ("launch.slurm", "launch.kubernetes")
"""Blocks that a starter only names: they are long, and belong into a site's profile."""


def _needs_thought(info: FieldInfo, inner: type[BaseModel]) -> bool:
    """A block that is off and has keys without a default cannot be switched on line by line."""
    return (
        _default(info) is None and not info.is_required() and any(f.is_required() for f in inner.model_fields.values())
    )


def _starter_lines(model: type[BaseModel], starter: dict[str, Any], prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, info in model.model_fields.items():
        path = prefix + key
        yield from (f"{indent}# {line}" for line in textwrap.wrap(_meaning(info), 110 - len(indent)))
        if path in _ONE_LINE:
            yield f"{indent}# {key}: {{}}"
        elif (inner := _inner(info)) and not _needs_thought(info, inner):
            live = any(known.startswith(f"{path}.") for known in starter)
            yield f"{indent}{key}:" if live else f"{indent}# {key}:"
            lines = _starter_lines(inner, starter, f"{path}.")
            yield from lines if live else (f"{indent}# {line.removeprefix(indent)}" for line in lines)
        elif path in starter:
            yield f"{indent}{key}: {_yaml(starter[path])}"
        else:
            yield f"{indent}# {key}: {_yaml(_default(info))}"
        if not prefix:
            yield ""


_INTRO = """\
# Recipe reference

*Made from the docstrings of the settings by `python -m llmkit.schema > docs/recipe-reference.md`; do not edit it.*

A recipe is one YAML file, read as YAML 1.2: `1e-5` is a number, `yes` and `2026-11-21` are text, a key given twice is a
mistake. `llmkit STAGE RECIPE KEY=VALUE` sets single values: the key is a dotted path (`train.learning_rate=1e-5`,
`data.train.0.weight=2` for an entry of a list), the value is YAML (`data.eval={split: 0.1}`). `KEY=` sets null; empty text
is `KEY='""'`. Blocks that are missing are made.

All mistakes are reported at once, with file, line and column; the exit code is 2. Types are strict: `"8"` is not a number,
`true` is not 1, and a whole number may stand for a number. Neither `${VAR}` nor `~` is expanded, because the recipe that a
run keeps must mean the same for everybody: let the shell expand them in `KEY=VALUE`. A recipe holds no secrets; a value
that looks like one is refused.

Anchors (`&name`, `*name`) and merge keys (`<<`) work. `llmkit init STAGE` writes a commented recipe, and
`llmkit export-schema STAGE` a JSON schema for your editor; with the YAML language server, put this line on top of a recipe:

```yaml
# yaml-language-server: $schema=sft.schema.json
```
"""


def reference() -> str:
    """The Markdown of docs/recipe-reference.md: every key of every stage with type, default and meaning."""
    parts = [_INTRO, "## Stages\n"]
    blocks: dict[type[BaseModel], list[str]] = {}
    for stage in stages.STAGES:
        model = recipe_type(stage)
        parts += [f"### `llmkit {stage}`\n", f"{_about(model)}\n", _table(model)]
        _collect(model, "", blocks)
    parts.append("## Blocks\n")
    for block, paths in blocks.items():
        title = " and ".join(f"`{path}`" for path in dict.fromkeys(paths))
        doc = _about(block)
        parts += [f"### {title}\n", *([f"{doc}\n"] if doc else []), _table(block)]
    return "\n".join(parts)


def _collect(model: type[BaseModel], prefix: str, blocks: dict[type[BaseModel], list[str]]) -> None:
    for key, info in model.model_fields.items():
        for inner in _blocks_in(info):
            blocks.setdefault(inner, []).append(prefix + key)
            _collect(inner, f"{prefix}{key}.", blocks)


def _blocks_in(info: FieldInfo) -> list[type[BaseModel]]:
    return [kind.model for kind in field_kinds(info) if kind.model]


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, info in model.model_fields.items():
        cells = (f"`{key}`", describe(field_kinds(info)), _default_cell(info), _meaning(info))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default_cell(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    default = _default(info)
    return "its defaults" if isinstance(default, BaseModel) else f"`{_yaml(default)}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
