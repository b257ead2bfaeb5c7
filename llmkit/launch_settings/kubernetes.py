"""Settings of the launchers on Kubernetes: pytorchjob, trainjob and polyaxon read the same ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmkit.recipe_errors import Conflict
from llmkit.settings import Settings

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN_ENV = re.compile(r"PET_.*|RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LOCAL_RANK")
RECIPE_FOLDER = "/etc/llmkit"
"""Where the ConfigMap with the frozen recipe is mounted in a pod."""


class SecretSettings(Settings):
    """One environment variable whose value is in a Secret of the cluster; the recipe never holds it."""

    env: str
    """Environment variable, e.g. ``AWS_SECRET_ACCESS_KEY``, ``HF_TOKEN``, ``MLFLOW_TRACKING_PASSWORD``."""
    name: str
    """Name of the Secret."""
    key: str
    """Key in the Secret."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from _env_name("env", self.env)
        yield from _object_name("name", self.name)


class VolumeSettings(Settings):
    """A claim on storage that is there already, mounted into every pod."""

    claim: str
    """Name of the PersistentVolumeClaim."""
    mount_path: str
    """Where the pods see it; absolute."""
    read_only: bool = False
    """Mounted for reading only."""
    sub_path: str | None = None
    """Folder of the volume that is mounted instead of its root."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from _object_name("claim", self.claim)
        if not self.mount_path.startswith("/") or ":" in self.mount_path:
            yield Conflict("mount_path", "must be an absolute path without a colon")
        if self.sub_path is not None and (self.sub_path.startswith("/") or ".." in self.sub_path.split("/")):
            yield Conflict("sub_path", "must be relative, without `..`")


class TolerationSettings(Settings):
    """A taint of nodes that the pods put up with."""

    key: str | None = None
    """Key of the taint; None with ``operator: Exists`` tolerates all."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """``Exists`` takes any value."""
    value: str | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; None is every effect."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """Seconds that a pod stays on a node that got the taint (``NoExecute``)."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.operator == "Exists" and self.value is not None:
            yield Conflict("value", "`operator: Exists` takes no value", also=("operator",))
        if self.operator == "Equal" and self.key is None:
            yield Conflict("key", "`operator: Equal` needs a key", also=("operator",))
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            yield Conflict("toleration_seconds", "needs `effect: NoExecute`", also=("effect",))


class ElasticSettings(Settings):
    """How many pods may be there at a time (PyTorchJob only): the run begins again from its checkpoint on a change."""

    min_nodes: Annotated[int, Field(ge=1)]
    """Fewest pods that the run goes on with."""
    max_nodes: Annotated[int, Field(ge=1)]
    """Most pods that the run is divided among."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often the processes are started again."""
    backend: Literal["c10d", "etcd", "etcd-v2"] = "c10d"
    """How the pods find each other (``rdzvBackend``)."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.max_nodes < self.min_nodes:
            yield Conflict("max_nodes", "is less than min_nodes", also=("min_nodes",))


class SchedulingSettings(Settings):
    """Gang scheduling by the cluster's batch scheduler (Volcano, coscheduling)."""

    min_available: Annotated[int, Field(ge=1)] | None = None
    """Pods that must fit at once; None is all of them."""
    queue: str | None = None
    """Queue of the batch scheduler; it cannot be changed after submission. Kueue's is ``launch.kubernetes.queue``."""
    priority_class: str | None = None
    """Priority class of the pod group."""
    schedule_timeout_seconds: Annotated[int, Field(ge=1)] | None = None
    """Seconds to wait for a place for all pods."""


class KubernetesSettings(Settings):
    """What the launchers on Kubernetes ask the cluster for."""

    free_text: ClassVar[frozenset[str]] = frozenset({"env", "annotations"})
    not_here: ClassVar[Mapping[str, str]] = {
        "partition": "that is Slurm's: launch.slurm.partition",
        "replicas": "launch.nodes",
        "nproc_per_node": "launch.processes",
        "tokens": "launch.kubernetes.secrets refers to Secrets of the cluster",
    }

    context: str | None = None
    """Context of the kubeconfig; None is its current one (in a pod: the pod's service account)."""
    namespace: str | None = None
    """Namespace; None is that of the context, else ``default``."""
    image: str | None = None
    """Image of the pods, with llmkit in it (``k8s/image/Dockerfile``). The launchers on Kubernetes need it."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled; None is the cluster's rule."""
    image_pull_secrets: list[str] = Field(default_factory=list)
    """Secrets by which the image is pulled."""
    service_account: str | None = None
    """Service account of the pods."""
    cpu: str | Annotated[float, Field(gt=0)] | None = None
    """Processors of each pod, asked for and at most: ``8``, ``500m``."""
    memory: str | None = None
    """Memory of each pod, asked for and at most: ``64Gi``."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of each pod."""
    gpu_kind: str = "nvidia.com/gpu"
    """Resource name of the GPUs: ``nvidia.com/gpu``, ``amd.com/gpu``, ``nvidia.com/mig-3g.40gb``."""
    resources: dict[str, str] = Field(default_factory=dict)
    """More resources of each pod, e.g. ``rdma/hca: "1"``, ``ephemeral-storage: 100Gi``."""
    shared_memory: str | None = "2Gi"
    """Size of /dev/shm, through which the processes of a pod exchange (it counts as memory); None leaves the runtime's 64 MB."""
    volumes: list[VolumeSettings] = Field(default_factory=list)
    """Claims that every pod mounts; the output folder should lie on one, or be ``s3://…``."""
    secrets: list[SecretSettings] = Field(default_factory=list)
    """Environment variables from Secrets: S3 credentials, tokens for Hugging Face and MLflow."""
    env_from: list[str] = Field(default_factory=list)
    """Secrets whose every key becomes an environment variable."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment variables, without secrets."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have, e.g. ``nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3``."""
    tolerations: list[TolerationSettings] = Field(default_factory=list)
    """Taints that the pods put up with."""
    affinity: dict[str, Any] | None = None
    """Affinity of the pods, in Kubernetes' own keys (``nodeAffinity``, ``podAntiAffinity``)."""
    run_as_user: Annotated[int, Field(ge=1)] | None = None
    """User id of the processes, for storage that demands one; None is the image's user, which must not be root."""
    fs_group: Annotated[int, Field(ge=1)] | None = None
    """Group id that mounted volumes belong to."""
    priority_class: str | None = None
    """Priority class of the pods."""
    labels: dict[str, str] = Field(default_factory=dict)
    """More labels of the job and its pods."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """More annotations of the job and its pods."""
    queue: str | None = None
    """Kueue's local queue (label ``kueue.x-k8s.io/queue-name``): Kueue starts the job when its quota allows."""
    recipe_by: Literal["config_map", "volume"] = "config_map"
    """How the frozen recipe comes into the pods: by a ConfigMap, or by the volume that the output folder lies on."""
    grace_seconds: Annotated[int, Field(ge=1)] = 300
    """Seconds between SIGTERM and SIGKILL: a checkpoint must be written in them."""
    suspend: bool = False
    """Submitted, but not started."""
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """Seconds after which the job is ended, whatever it does."""
    backoff_limit: Annotated[int, Field(ge=0)] = 3
    """How often pods are started again (after exit code 138, a kill or a lost node) before the job counts as failed."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    """Seconds after the end when the cluster forgets the job; None keeps it."""
    clean_pod_policy: Literal["None", "Running", "All"] = "None"
    """Which pods are removed at the end; ``None`` keeps all, so that their logs can be read."""
    elastic: ElasticSettings | None = None
    """An elastic PyTorchJob; None is a fixed number of pods."""
    scheduling: SchedulingSettings | None = None
    """Gang scheduling of a PyTorchJob."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime that a TrainJob refers to."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._names()
        yield from self._quantities()
        yield from self._environment()
        yield from self._labels()
        paths = [volume.mount_path.rstrip("/") for volume in self.volumes]
        for i, path in enumerate(paths):
            if path in paths[:i] or path in ("", RECIPE_FOLDER, "/dev/shm"):
                yield Conflict(f"volumes.{i}.mount_path", f"{path or '/'} is taken by another volume, or by the system")

    def _names(self) -> Iterator[Conflict]:
        for key in ("namespace", "service_account", "priority_class", "runtime"):
            if (name := getattr(self, key)) is not None:
                yield from _object_name(key, name)
        for key in ("image_pull_secrets", "env_from"):
            for i, name in enumerate(getattr(self, key)):
                yield from _object_name(f"{key}.{i}", name)
        if self.image is not None and (not self.image.strip() or any(c.isspace() for c in self.image)):
            yield Conflict("image", "is not an image's name: it is empty or holds a space")

    def _quantities(self) -> Iterator[Conflict]:
        quantities = {"cpu": self.cpu, "memory": self.memory, "shared_memory": self.shared_memory}
        quantities |= {f"resources.{name}": value for name, value in self.resources.items()}
        for key, value in quantities.items():
            if isinstance(value, str) and not _QUANTITY.fullmatch(value):
                yield Conflict(key, f"{value!r} is not a quantity", "a number, with m, Ki, Mi, Gi or Ti behind it")
        for own in ("cpu", "memory", self.gpu_kind):
            if own in self.resources:
                key = "gpus" if own == self.gpu_kind else own
                yield Conflict(f"resources.{own}", f"`{key}` says that already", also=(key,))

    def _environment(self) -> Iterator[Conflict]:
        names = [*self.env, *(secret.env for secret in self.secrets)]
        for name in self.env:
            yield from _env_name(f"env.{name}", name)
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Conflict("secrets", f"{name} is set twice", also=("env",))
        for name in names:
            if _OWN_ENV.fullmatch(name):
                yield Conflict("env", f"{name} is the operator's: launch.nodes and launch.processes say how many")

    def _labels(self) -> Iterator[Conflict]:
        for key in ("labels", "node_selector", "annotations"):
            for name, value in getattr(self, key).items():
                prefix, slash, rest = name.rpartition("/")
                if not _LABEL_NAME.fullmatch(rest) or (slash and not _SUBDOMAIN.fullmatch(prefix)):
                    yield Conflict(f"{key}.{name}", "is not a name that Kubernetes allows")
                if key != "annotations" and not _LABEL_VALUE.fullmatch(value):
                    hint = "at most 63 letters, digits, `-`, `_`, `.`; a letter or digit at both ends"
                    yield Conflict(f"{key}.{name}", f"{value!r} is not a label's value", hint)
                if key != "node_selector" and prefix in ("llmkit", "llmkit.io"):
                    yield Conflict(f"{key}.{name}", "is llmkit's own: it finds its jobs by it")


def _object_name(key: str, name: str) -> Iterator[Conflict]:
    if not _SUBDOMAIN.fullmatch(name) or len(name) > 253:
        yield Conflict(key, f"{name!r} is not a name that Kubernetes allows", "small letters, digits and `-`")


def _env_name(key: str, name: str) -> Iterator[Conflict]:
    if not _ENV_NAME.fullmatch(name):
        yield Conflict(key, f"{name!r} is not the name of an environment variable")
