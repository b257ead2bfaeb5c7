"""Where a run runs. A launcher is a module with ``render(job) -> text`` (pure) and ``submit(job, in_process)``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

LAUNCHERS: dict[str, str] = {
    "local": "llmkit.launch.local",
}


def load(launcher: str) -> ModuleType:
    return import_module(LAUNCHERS[launcher])
