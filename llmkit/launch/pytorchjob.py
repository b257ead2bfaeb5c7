"""``--launcher pytorchjob``: a PyTorchJob (kubeflow.org/v1) of Kubeflow's training operator.

One Master and ``launch.nodes - 1`` Workers, each a pod; an elastic job has Workers only. Pods end with llmkit's exit codes,
and ``restartPolicy: ExitCode`` starts those again that ended with 128 or more: 138 is "stopped with a checkpoint".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmkit.errors import MissingError
from llmkit.kube import api, names, pods, rules
from llmkit.kube import logs as podlogs
from llmkit.launch.job import Job, Resources
from llmkit.launch.record import JobStatus, Place, Record
from llmkit.launch_settings import LaunchSettings
from llmkit.recipe import Recipe

KIND = api.Kind(
    "kubeflow.org", "v1", "pytorchjobs", "PyTorchJob", "training.kubeflow.org/job-name", "Kubeflow's training operator"
)


def resources(recipe: Recipe) -> Resources:
    """A pod for each of ``launch.nodes``; in it ``launch.processes``, ``auto`` being one for each GPU asked for."""
    settings = recipe.launch
    wanted = settings.processes if settings.processes != "auto" else max(1, settings.kubernetes.gpus)
    return Resources(settings.nodes, wanted if recipe.several_processes else 1)


def describe(job: Job) -> str:
    """The pods and processes, in words."""
    pods_, each = job.resources.nodes, job.resources.processes_per_node
    return f"{job.resources.processes}: {pods_} pod{'s'[: pods_ != 1]} with {each} each"


def check(settings: LaunchSettings) -> None:
    """``RecipeError`` with all that the operator's webhook would refuse."""
    rules.check(settings, "pytorchjob")


def waiting_for(settings: LaunchSettings, after: Sequence[str]) -> LaunchSettings:
    """The settings of a job that begins after others; Kubernetes has no such order."""
    return api.no_order(settings, after)


def render(job: Job, settings: LaunchSettings) -> str:
    """The ConfigMap with the recipe and the PyTorchJob, as ``kubectl apply -f -`` takes them."""
    return pods.as_yaml(objects(job, settings))


def objects(job: Job, settings: LaunchSettings) -> list[dict[str, Any]]:
    """What ``render`` writes, in the order of creation."""
    check(settings)
    rules.no_sweep(job)
    name = names.job_name(job.name, names.token_of(job))
    kube = settings.kubernetes
    recipe = [pods.config_map(name, job, kube)] if pods.by_config_map(job, kube) else []
    return [*recipe, _pytorch_job(name, job, settings)]


def _pytorch_job(name: str, job: Job, settings: LaunchSettings) -> dict[str, Any]:
    kubeflow, kube = _models(), settings.kubernetes
    queue = {names.QUEUE: kube.queue} if kube.queue else {}
    metadata = pods.models().V1ObjectMeta(
        name=name, namespace=kube.namespace, labels=names.labels_of(job, kube) | queue,
        annotations=names.annotations_of(job, kube),
    )  # fmt: skip
    spec = kubeflow.KubeflowOrgV1PyTorchJobSpec(
        nproc_per_node=str(job.resources.processes_per_node), elastic_policy=_elastic_policy(settings),
        pytorch_replica_specs=_replicas(name, job, settings), run_policy=_run_policy(settings),
    )  # fmt: skip
    return pods.plain(
        kubeflow.KubeflowOrgV1PyTorchJob(api_version=KIND.api_version, kind=KIND.kind, metadata=metadata, spec=spec)
    )


def _replicas(name: str, job: Job, settings: LaunchSettings) -> dict[str, Any]:
    def replica(count: int) -> Any:
        template = pods.pod_template(name, job, settings.kubernetes)
        return _models().KubeflowOrgV1ReplicaSpec(replicas=count, restart_policy="ExitCode", template=template)

    nodes = job.resources.nodes
    if settings.kubernetes.elastic is not None:
        return {"Worker": replica(nodes)}
    return {"Master": replica(1)} | ({"Worker": replica(nodes - 1)} if nodes > 1 else {})


def _elastic_policy(settings: LaunchSettings) -> Any:
    elastic = settings.kubernetes.elastic
    if elastic is None:
        return None
    return _models().KubeflowOrgV1ElasticPolicy(
        min_replicas=elastic.min_nodes, max_replicas=elastic.max_nodes, max_restarts=elastic.max_restarts,
        rdzv_backend=elastic.backend,
    )  # fmt: skip


def _run_policy(settings: LaunchSettings) -> Any:
    kube = settings.kubernetes
    scheduling = None
    if kube.scheduling is not None:
        scheduling = _models().KubeflowOrgV1SchedulingPolicy(
            min_available=kube.scheduling.min_available, queue=kube.scheduling.queue,
            priority_class=kube.scheduling.priority_class,
            schedule_timeout_seconds=kube.scheduling.schedule_timeout_seconds,
        )  # fmt: skip
    return _models().KubeflowOrgV1RunPolicy(
        clean_pod_policy=kube.clean_pod_policy, backoff_limit=kube.backoff_limit, suspend=kube.suspend or None,
        active_deadline_seconds=kube.active_deadline_seconds, scheduling_policy=scheduling,
        ttl_seconds_after_finished=kube.ttl_seconds_after_finished,
    )  # fmt: skip


def _models() -> Any:
    try:
        import kubeflow.training.models
    except ModuleNotFoundError as error:
        raise MissingError("--launcher pytorchjob needs kubeflow-training: pip install 'llmkit[k8s]'") from error
    return kubeflow.training.models


# The job on the cluster


def submit(job: Job, settings: LaunchSettings) -> Place:
    """Create the ConfigMap and the job; a job that is there already with this token is adopted."""
    return api.submit(KIND, objects(job, settings), settings.kubernetes)


def find(record: Record) -> Place | None:
    """The job of a submission that was interrupted; None where it never came to be."""
    return api.find(KIND, record)


def status(record: Record) -> JobStatus:
    """How the job stands, by the operator's conditions and the pods'."""
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
