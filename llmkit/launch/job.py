"""One run, described without saying where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """Machines, and processes on each of them."""

    nodes: int = 1
    processes_per_node: int = 1


@dataclass(frozen=True)
class Job:
    """``argv`` is the command every launcher starts, run in ``cwd`` with ``env`` added to the environment."""

    argv: tuple[str, ...]
    output_dir: Path
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = Resources()
