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

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass(frozen=True)
class Job:
    """``argv`` is the command every launcher starts, run in ``cwd`` with ``env`` added to the environment.

    ``token`` is in the submitted text and in the record, so that a job whose submission was interrupted is found
    again; ``recipe`` is the frozen recipe's text; ``sweep`` holds the recipe files of a sweep's runs, in their order. ``remote``: the
    run's folder is in an object store, and ``output_dir`` is the scratch folder of the machine that submits.
    """

    argv: tuple[str, ...]
    output_dir: Path
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = Resources()
    name: str = "run"
    stage: str = "run"
    token: str = ""
    recipe: str = ""
    sweep: tuple[str, ...] = ()
    remote: bool = False

    @property
    def logs(self) -> Path:
        """The folder of the scheduler's log, which the node must see: in the run's folder (beside the folders of a
        sweep's runs), or in the working directory where that is in an object store."""
        if self.remote:
            return self.cwd / "logs" / self.output_dir.name
        return (self.output_dir.parent if self.sweep else self.output_dir) / "logs"
