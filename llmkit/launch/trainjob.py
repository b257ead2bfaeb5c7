"""``--launcher trainjob``: a TrainJob (trainer.kubeflow.org/v1alpha1), the API that follows the PyTorchJob.

The same settings, said in its way: the runtime (``launch.kubernetes.runtime``) is the cluster's template of a torch job, the
trainer says command, pods, processes and resources, and a patch what the pods need besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmkit.kube import api, names, pods, rules
from llmkit.kube import logs as podlogs
from llmkit.launch.job import Job, Resources
from llmkit.launch.pytorchjob import describe as _describe
from llmkit.launch.pytorchjob import resources as _resources
from llmkit.launch.record import JobStatus, Place, Record
from llmkit.launch_settings import LaunchSettings
from llmkit.recipe import Recipe

KIND = api.Kind(
    "trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob", "jobset.sigs.k8s.io/jobset-name", "Kubeflow's trainer"
)
_MANAGER = "llmkit.io/launcher"
_CONTAINER = "node"
"""Name of the trainer's container, and of its job, in Kubeflow's runtimes."""


def resources(recipe: Recipe) -> Resources:
    """As of a PyTorchJob."""
    return _resources(recipe)


def describe(job: Job) -> str:
    """The pods and processes, in words."""
    return _describe(job)


def check(settings: LaunchSettings) -> None:
    """``RecipeError`` with all that a TrainJob cannot do."""
    rules.check(settings, "trainjob")


def waiting_for(settings: LaunchSettings, after: Sequence[str]) -> LaunchSettings:
    return api.no_order(settings, after)


def render(job: Job, settings: LaunchSettings) -> str:
    """The ConfigMap with the recipe and the TrainJob, as ``kubectl apply -f -`` takes them."""
    return pods.as_yaml(objects(job, settings))


def objects(job: Job, settings: LaunchSettings) -> list[dict[str, Any]]:
    """What ``render`` writes, in the order of creation."""
    check(settings)
    rules.no_sweep(job)
    name = names.job_name(job.name, names.token_of(job))
    kube = settings.kubernetes
    recipe = [pods.config_map(name, job, kube)] if pods.by_config_map(job, kube) else []
    return [*recipe, _train_job(name, job, settings)]


def _train_job(name: str, job: Job, settings: LaunchSettings) -> dict[str, Any]:
    kube = settings.kubernetes
    queue = {names.QUEUE: kube.queue} if kube.queue else {}
    metadata = pods.models().V1ObjectMeta(
        name=name, namespace=kube.namespace, labels=names.labels_of(job, kube) | queue,
        annotations=names.annotations_of(job, kube),
    )  # fmt: skip
    template = pods.plain(pods.pod_template(name, job, kube, _CONTAINER))
    container = template["spec"]["containers"][0]
    trainer = {
        "image": container["image"], "command": container["command"], "env": container["env"],
        "numNodes": job.resources.nodes, "numProcPerNode": job.resources.processes_per_node,
        "resourcesPerNode": container.get("resources"),
    }  # fmt: skip
    spec = {
        "runtimeRef": {"name": kube.runtime}, "trainer": {k: v for k, v in trainer.items() if v is not None},
        "runtimePatches": [_patch(template)], "suspend": kube.suspend or None,
        "activeDeadlineSeconds": kube.active_deadline_seconds,
    }  # fmt: skip
    # Not made of kubeflow-trainer-api's models: they hold no quantities ("2Gi"). The tests' API server has their schema.
    spec = {key: value for key, value in spec.items() if value is not None}
    return {"apiVersion": KIND.api_version, "kind": KIND.kind, "metadata": pods.plain(metadata), "spec": spec}


_POD_KEYS = (
    "affinity", "imagePullSecrets", "nodeSelector", "securityContext", "serviceAccountName",
    "terminationGracePeriodSeconds", "tolerations", "volumes",
)  # fmt: skip
_CONTAINER_KEYS = ("name", "volumeMounts", "securityContext")


def _patch(template: dict[str, Any]) -> dict[str, Any]:
    """What the runtime's pods get besides: the trainer has no place for it."""
    pod, container = template["spec"], template["spec"]["containers"][0]
    spec = {key: pod[key] for key in _POD_KEYS if key in pod}
    spec["containers"] = [{key: container[key] for key in _CONTAINER_KEYS if key in container}]
    inner = {"template": {"metadata": template["metadata"], "spec": spec}}
    jobs = [{"name": _CONTAINER, "template": {"spec": inner}}]
    return {"manager": _MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}


# The job on the cluster


def submit(job: Job, settings: LaunchSettings) -> Place:
    """Create the ConfigMap and the job; a job that is there already with this token is adopted."""
    return api.submit(KIND, objects(job, settings), settings.kubernetes)


def find(record: Record) -> Place | None:
    """The job of a submission that was interrupted; None where it never came to be."""
    return api.find(KIND, record)


def status(record: Record) -> JobStatus:
    """How the job stands, by the trainer's conditions and the pods'."""
    return api.status(KIND, record)


def look_after(record: Record) -> JobStatus:
    """The first look after submission."""
    return api.status(KIND, record)


class Log(podlogs.Log):
    """What the pods write, the first pod's first."""

    def __init__(self, record: Record) -> None:
        super().__init__(KIND, record)


def logs(record: Record, follow: bool) -> Iterator[str]:
    """What the pods have written; with ``follow``, as it comes, until the job ends."""
    return podlogs.follow(KIND, record, follow)


def cancel(record: Record) -> None:
    """Delete the job and with it its pods, which get SIGTERM and ``grace_seconds``."""
    api.cancel(KIND, record)
