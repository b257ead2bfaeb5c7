"""Settings of ``--launcher slurm``: what the job asks the cluster for, and what is done around it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmkit.recipe_errors import Conflict
from llmkit.settings import Settings

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?")
_PLAIN = ("partition", "account", "qos", "gpus_per_node", "gres", "constraint", "reservation", "exclude", "dependency")


class ContainerSettings(Settings):
    """The image that the run's processes are started in."""

    image: Annotated[str, Field(min_length=1)]
    """Image, as the runtime names it: ``docker://…`` or a ``.sif`` file for apptainer, ``registry#image`` or a ``.sqsh`` file for pyxis."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """``pyxis`` (``srun --container-image``), or ``apptainer exec``."""
    mounts: list[str] = Field(default_factory=list)
    """Folders of the node that the container sees, ``/outside:/inside``; the run's folder and the working directory are added."""


class SlurmSettings(Settings):
    """What the job asks Slurm for, in sbatch's words."""

    free_text: ClassVar[frozenset[str]] = frozenset({"setup", "environment"})

    partition: str | None = None
    """Partition; None is the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit of one start: ``minutes``, ``hours:minutes:seconds`` or ``days-hours``. A run that needs longer is stopped with a checkpoint, requeued and goes on."""
    gpus_per_node: str | int | None = None
    """GPUs of each node, ``4`` or ``a100:4``; a process is started for each."""
    gres: str | None = None
    """Other generic resources, in sbatch's words."""
    cpus_per_process: Annotated[int, Field(ge=1)] | None = None
    """Cores of each process (``--cpus-per-task``)."""
    mem: str | None = None
    """Memory of each node, e.g. ``64G``."""
    constraint: str | None = None
    """Features that the nodes must have."""
    reservation: str | None = None
    """Reservation to run in."""
    exclude: str | None = None
    """Nodes to stay away from."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    dependency: str | None = None
    """Jobs to wait for, in sbatch's words (``afterok:123``); ``--after JOB`` adds one."""
    array_parallel: Annotated[int, Field(ge=1)] | None = None
    """Most jobs of a sweep that run at the same time; None leaves it to Slurm."""
    signal_seconds: Annotated[int, Field(ge=10, le=3600)] = 300
    """How long before the time limit the run is told to save a checkpoint and leave. Slurm may be up to a minute early."""
    max_requeues: Annotated[int, Field(ge=0, le=1000)] = 50
    """How often a run that was stopped with a checkpoint is put into the queue again by itself."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules to load."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that run on the first node before the run starts; a line that fails ends the job."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job, beside those of the shell that submits it. No secrets: they are in the script."""
    container: ContainerSettings | None = None
    """Image to start the processes in; None uses the nodes as they are."""
    command: str | None = None
    """The program llmkit on the nodes; None takes the one that submits (in a container: ``llmkit``)."""
    template: str | None = None
    """A copy of ``slurm/job.sbatch.j2`` with changes of your own; None takes llmkit's."""
    sbatch_options: list[str] = Field(default_factory=list)
    """Further lines for sbatch, e.g. ``--mail-type=END``."""

    def conflicts(self) -> Iterator[Conflict]:
        for key in _PLAIN:
            value = getattr(self, key)
            if isinstance(value, str) and (not value.strip() or re.search(r"[\s'\"\\]", value)):
                yield Conflict(key, "is empty, or holds spaces, quotes or backslashes, which no name in Slurm has")
        if self.time is not None and not _TIME.fullmatch(self.time):
            hint = "e.g. 30 (minutes), 04:00:00 or 1-12 (one day and twelve hours); in quotes, since YAML reads 30 as a number"
            yield Conflict("time", "is no time limit", hint)
        if self.mem is not None and not _MEMORY.fullmatch(self.mem):
            yield Conflict("mem", "is no amount of memory", "e.g. 64G, or 500M")
        if isinstance(self.gpus_per_node, str) and not re.fullmatch(r"(\S+:)?[1-9]\d*", self.gpus_per_node):
            yield Conflict("gpus_per_node", "has no number of GPUs", "e.g. 4, or a100:4")
        for i, option in enumerate(self.sbatch_options):
            if not option.startswith("-") or "\n" in option:
                yield Conflict(f"sbatch_options.{i}", "is no option of sbatch", "e.g. --mail-type=END")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                yield Conflict("environment", f"{name!r} is no name of an environment variable")

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        return int(str(self.gpus_per_node).rpartition(":")[2]) if self.gpus_per_node is not None else 0
