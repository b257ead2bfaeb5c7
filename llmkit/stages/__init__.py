"""The stages by name: the map of what llmkit does. A module has ``Recipe`` and ``run(recipe, ctx) -> Result``.

Importing a stage's module is cheap: torch and the like are imported inside ``run``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

STAGES: dict[str, str] = {
    "sft": "llmkit.stages.sft",
    "lora": "llmkit.stages.lora",
    "cpt": "llmkit.stages.cpt",
    "prompt-test": "llmkit.stages.prompt_test",
    "check-data": "llmkit.stages.check_data",
    "embed": "llmkit.stages.embed",
    "label": "llmkit.stages.label",
}


def by_attribute(name: str) -> str | None:
    """The stage that Python calls ``name`` (``prompt_test`` is ``prompt-test``); None where there is none."""
    stage = name.replace("_", "-")
    return stage if stage in STAGES else None


def load(stage: str) -> ModuleType:
    return import_module(STAGES[stage])
