"""``--launcher polyaxon --dry-run``: a Polyaxon operation of kind ``pytorchjob``. Polyaxon's own command line runs it.

llmkit sft recipe.yaml --launcher polyaxon --dry-run > polyaxon.yaml
polyaxon check -f polyaxon.yaml && polyaxon run -f polyaxon.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from llmkit.errors import UsageError
from llmkit.kube import api, names, pods, rules
from llmkit.launch.job import Job, Resources
from llmkit.launch.pytorchjob import describe as _describe
from llmkit.launch.pytorchjob import resources as _resources
from llmkit.launch_settings import LaunchSettings
from llmkit.recipe import Recipe

_THEIRS = (
    "Polyaxon's own command line submits, shows and stops its runs: "
    "llmkit STAGE RECIPE --launcher polyaxon --dry-run > polyaxon.yaml; polyaxon run -f polyaxon.yaml"
)


def resources(recipe: Recipe) -> Resources:
    """As of a PyTorchJob."""
    return _resources(recipe)


def describe(job: Job) -> str:
    """The pods and processes, in words."""
    return _describe(job)


def check(settings: LaunchSettings) -> None:
    """``RecipeError`` with all that an operation cannot say."""
    rules.check(settings, "polyaxon")


def waiting_for(settings: LaunchSettings, after: Sequence[str]) -> LaunchSettings:
    return api.no_order(settings, after)


def render(job: Job, settings: LaunchSettings) -> str:
    """``polyaxon.yaml``. The recipe is on the volume, or in the bucket, that the output folder is on."""
    check(settings)
    rules.no_sweep(job)
    kube = settings.kubernetes.model_copy(update={"recipe_by": "volume"})
    name = names.job_name(job.name, names.token_of(job))
    template = pods.plain(pods.pod_template(name, job, kube, "polyaxon-main"))
    replica = _replica(template)
    nodes = job.resources.nodes
    run = {
        "kind": "pytorchjob", "cleanPodPolicy": kube.clean_pod_policy, "nProcPerNode": job.resources.processes_per_node,
        "master": {"replicas": 1, **replica},
        "worker": {"replicas": nodes - 1, **replica} if nodes > 1 else None,
    }  # fmt: skip
    termination = {
        "maxRetries": kube.backoff_limit,
        "ttl": kube.ttl_seconds_after_finished,
        "timeout": kube.active_deadline_seconds,
    }
    operation = {
        "kind": "operation", "name": name, "tags": ["llmkit", job.stage],
        "queue": kube.queue, "termination": _given(termination),
        "component": {"kind": "component", "name": job.stage, "run": _given(run)},
    }  # fmt: skip
    return pods.as_yaml([_given(operation)])


_ENVIRONMENT = {
    "nodeSelector": "nodeSelector", "affinity": "affinity", "tolerations": "tolerations",
    "serviceAccountName": "serviceAccountName", "priorityClassName": "priorityClassName",
    "securityContext": "securityContext",
}  # fmt: skip


def _replica(template: dict[str, Any]) -> dict[str, Any]:
    """A pod in Polyaxon's words: its environment, its volumes, its container."""
    pod = template["spec"]
    environment = {theirs: pod[key] for key, theirs in _ENVIRONMENT.items() if key in pod}
    environment |= {"labels": template["metadata"]["labels"], "annotations": template["metadata"]["annotations"]}
    environment["restartPolicy"] = "ExitCode"
    if "imagePullSecrets" in pod:
        environment["imagePullSecrets"] = [secret["name"] for secret in pod["imagePullSecrets"]]
    return _given({"environment": environment, "volumes": pod.get("volumes"), "container": pod["containers"][0]})


def _given(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if value not in (None, {})}


def _theirs(*_: object) -> NoReturn:
    """llmkit does not submit to Polyaxon: ``UsageError`` says who does."""
    raise UsageError(_THEIRS)


submit = find = status = look_after = logs = cancel = _theirs
