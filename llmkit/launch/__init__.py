"""Where a run runs: the launchers by name.

A launcher is a module with ``resources(recipe)``, ``render(job, settings) -> text`` (pure: the same job gives the same
text), and ``describe(job)``. One that runs elsewhere also has ``submit(job, settings) -> Place``, ``find(token)``,
``status(record)``, ``logs(record, follow)`` and ``cancel(record)``; ``launch.remote`` does what they have in common.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

LAUNCHERS: dict[str, str] = {
    "local": "llmkit.launch.local",
    "slurm": "llmkit.launch.slurm",
    "pytorchjob": "llmkit.launch.pytorchjob",
    "trainjob": "llmkit.launch.trainjob",
    "polyaxon": "llmkit.launch.polyaxon",
}

PROGRAM: list[str] = []
"""How this program was started, so that its processes are started the same way; empty where llmkit is a library."""


def load(launcher: str) -> ModuleType:
    return import_module(LAUNCHERS[launcher])
