"""Settings of ``launch:``: where a run runs. They may differ between two starts of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from llmkit.launch_settings.kubernetes import KubernetesSettings
from llmkit.launch_settings.slurm import SlurmSettings
from llmkit.recipe_errors import Conflict
from llmkit.settings import Settings
from llmkit.uris import is_uri

LauncherName = Literal["local", "slurm", "pytorchjob", "trainjob", "polyaxon"]


class LaunchSettings(Settings):
    launcher: LauncherName = "local"
    """Where the run runs; ``--launcher`` wins over it."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Machines that the run is divided among, by a launcher that has several."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes on each machine; ``auto`` is one for each visible GPU (under a scheduler: for each GPU that is asked for), one on a CPU. Under another program's launcher (torchrun) it is that program's number."""
    timeout_minutes: Annotated[float, Field(gt=0, le=10_000)] = 30.0
    """Longest that a process waits for the others in one exchange (the process group's time-out in NCCL and gloo) before the run ends."""
    scratch_dir: str | None = None
    """With an ``output_dir`` in an object store: the folder on this machine below which runs work; None takes LLMKIT_SCRATCH, else llmkit's cache folder."""
    upload_minutes: Annotated[float, Field(gt=0, le=10_000)] = 2.0
    """With an ``output_dir`` in an object store: how long the end of a run waits while the store takes nothing."""
    slurm: SlurmSettings = SlurmSettings()
    """What ``--launcher slurm`` asks the cluster for."""
    kubernetes: KubernetesSettings = KubernetesSettings()
    """What ``--launcher pytorchjob`` and its like ask Kubernetes for."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.nodes > 1 and self.launcher == "local":
            hint = "choose a launcher that has several, e.g. `launcher: slurm`"
            yield Conflict("nodes", "the launcher of this machine has one machine", hint, ("launcher",))
        if self.scratch_dir is not None and is_uri(self.scratch_dir):
            yield Conflict("scratch_dir", "is a folder on this machine, not a URI", "put the URI into `output_dir`")
