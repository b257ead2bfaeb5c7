"""Where a run runs. A launcher is a module with ``resources(recipe)``, ``render(job) -> text`` (pure) and
``submit(job, recipe, stage, resume) -> Result``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

LAUNCHERS: dict[str, str] = {
    "local": "llmkit.launch.local",
}

PROGRAM: list[str] = []
"""How this program was started, so that its processes are started the same way; empty where llmkit is a library."""


def load(launcher: str) -> ModuleType:
    return import_module(LAUNCHERS[launcher])
