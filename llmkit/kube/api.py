"""The API server: create once, read, delete; and what its refusals mean, in llmkit's words.

Everything that changes the cluster can be sent again: a job's name holds the submission's token, so that a second
creation of it is refused (409) and the first one is taken for what it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import yaml

from llmkit import rundir
from llmkit.errors import LlmkitError, MissingError, UsageError
from llmkit.kube import names
from llmkit.kube.pods import models
from llmkit.launch.record import JobStatus, Place, Record
from llmkit.launch_settings import LaunchSettings
from llmkit.launch_settings.kubernetes import KubernetesSettings

TIMEOUT_S = (5.0, 30.0)
"""Seconds to connect, and to wait for an answer."""
ATTEMPTS = 4
"""How often a call is made while the server does not answer: about 7 seconds of pauses."""
_BUSY = frozenset({429, 500, 502, 503, 504})
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A kind of job: where it is in the API, by which label its pods are found, and who watches over it."""

    group: str
    version: str
    plural: str
    kind: str
    pod_label: str
    owner: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"


class Cluster:
    """One API server, as one user, seen in one namespace."""

    def __init__(self, context: str | None, namespace: str | None) -> None:
        client, self.namespace, self.server = _connect(context, namespace)
        self.core: Any = models().CoreV1Api(client)
        self.custom: Any = models().CustomObjectsApi(client)

    def call(self, what: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """One request, made again while the server is away or overloaded. Raises MissingError where it stays away or does
        not know the user, UsageError where it refuses."""
        for attempt in range(ATTEMPTS):
            try:
                return function(*args, **{"_request_timeout": TIMEOUT_S} | options)
            except Exception as error:
                known = translated(error, what, self.server)
                if known is None:
                    raise
                if attempt == ATTEMPTS - 1 or not _passes(error):
                    raise known from error
                time.sleep(2.0**attempt)
        raise AssertionError("unreachable")


def cluster_of(settings: KubernetesSettings) -> Cluster:
    return Cluster(settings.context, settings.namespace)


def _connect(context: str | None, namespace: str | None) -> tuple[Any, str, str]:
    """A client by the kubeconfig, else by the pod's service account."""
    models()
    from kubernetes import config
    from kubernetes.config.config_exception import ConfigException

    file = os.environ.get("KUBECONFIG")  # the package reads it only once, when it is imported
    try:
        client = config.new_client_from_config(config_file=file, context=context)
        known, current = config.list_kube_config_contexts(config_file=file)
        if context is not None:
            current = next(c for c in known if c["name"] == context)
        namespace = namespace or current["context"].get("namespace") or "default"
    except (ConfigException, yaml.YAMLError, OSError) as error:
        if context is None and (inside := _service_account()) is not None:
            return inside[0], namespace or inside[1], inside[0].configuration.host
        raise MissingError(f"There is no usable kubeconfig here (KUBECONFIG, or ~/.kube/config): {error}") from error
    # urllib3 would try again by itself, without a pause; `call` does, with one.
    client.configuration.retries = False
    client.rest_client = type(client.rest_client)(client.configuration)
    return client, namespace, client.configuration.host


def _service_account() -> tuple[Any, str] | None:
    from pathlib import Path

    from kubernetes import config
    from kubernetes.config.config_exception import ConfigException

    try:
        config.load_incluster_config()
    except ConfigException:
        return None
    folder = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    return models().ApiClient(), (folder / "namespace").read_text(encoding="utf-8").strip()


# What went wrong


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    status = getattr(error, "status", None)
    return status in _BUSY or status in (None, 0)


def translated(error: Exception, what: str, server: str) -> LlmkitError | None:
    """What an exception of the client means; None for one that is not the server's."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, HTTPError):
        return MissingError(f"The Kubernetes API server {server} does not answer ({what}): {_reason(error)}")
    if not isinstance(error, ApiException):
        return None
    said = _said(error)
    if error.status == 401:
        return MissingError(f"The Kubernetes API server {server} does not know you ({what}): the token has expired or is "
                            "wrong. Log in to the cluster again; the same command goes on.")  # fmt: skip
    if error.status == 403:
        return UsageError(
            f"Kubernetes refused ({what}): {said}. k8s/base/rbac.yaml holds the rights that llmkit needs."
        )
    if error.status in _BUSY or not error.status:
        return MissingError(f"The Kubernetes API server {server} cannot answer now ({what}): {said}")
    if error.status == 404 and said.startswith("404 page not found"):
        return MissingError(f"The cluster does not have this API ({what}). Is the operator installed?")
    return UsageError(f"Kubernetes refused ({what}): {said}")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason).rpartition(">: ")[2] or type(error).__name__


def _said(error: Any) -> str:
    """The server's own words: ``message`` of its Status object."""
    try:
        return str(json.loads(error.body)["message"]).rstrip(".")
    except (TypeError, ValueError, KeyError):
        return str(error.body or error.reason or "no reason given").strip()


def _is(error: LlmkitError, status: int) -> bool:
    return getattr(error.__cause__, "status", None) == status


# Submitting


def submit(kind: Kind, objects: Sequence[Mapping[str, Any]], settings: KubernetesSettings) -> Place:
    """Create the objects, the job last; what is there already with the same token is this submission's own.

    The server is asked first whether it would take the job: a refusal leaves nothing behind.
    """
    cluster, job = cluster_of(settings), objects[-1]
    create = cluster.custom.create_namespaced_custom_object
    where = (kind.group, kind.version, cluster.namespace, kind.plural)
    name = job["metadata"]["name"]
    what = f"creating {kind.kind} {name} in namespace {cluster.namespace}"
    made = _get(cluster, kind, name)
    if made is None:
        _operator_is_there(lambda: cluster.call(what, create, *where, job, dry_run="All"), kind)
        for other in objects[:-1]:
            _create_config_map(cluster, other)
        try:
            made = cluster.call(what, create, *where, job)
        except LlmkitError as error:
            if not _is(error, 409):
                _remove_config_map(cluster, name)
                raise
            made = _get(cluster, kind, name)
    if made is None or made["metadata"]["labels"].get(names.TOKEN) != job["metadata"]["labels"][names.TOKEN]:
        raise UsageError(f"There is another {kind.kind} {name} in namespace {cluster.namespace}.")
    _own(cluster, kind, made)
    return _place(settings, cluster, made)


def _operator_is_there(call: Callable[[], T], kind: Kind) -> T:
    try:
        return call()
    except LlmkitError as error:
        if _is(error, 404) and isinstance(error, MissingError):
            raise MissingError(
                f"The cluster has no {kind.kind} ({kind.api_version}): {kind.owner} is not installed there."
            ) from error
        raise


def _create_config_map(cluster: Cluster, body: Mapping[str, Any]) -> None:
    name = body["metadata"]["name"]
    try:
        cluster.call(f"creating ConfigMap {name}", cluster.core.create_namespaced_config_map, cluster.namespace, body)
    except LlmkitError as error:
        if not _is(error, 409):
            raise


def _remove_config_map(cluster: Cluster, job: str) -> None:
    name = names.config_map_name(job)
    try:
        cluster.call(f"deleting ConfigMap {name}", cluster.core.delete_namespaced_config_map, name, cluster.namespace)
    except LlmkitError as error:
        if not _is(error, 404):
            raise


def _own(cluster: Cluster, kind: Kind, job: Mapping[str, Any]) -> None:
    """Make the ConfigMap the job's, so that the cluster removes it with the job."""
    metadata = job["metadata"]
    owner = {"apiVersion": kind.api_version, "kind": kind.kind, "name": metadata["name"], "uid": metadata["uid"]}
    name = names.config_map_name(metadata["name"])
    patch = cluster.core.patch_namespaced_config_map
    try:
        cluster.call(
            f"patching ConfigMap {name}", patch, name, cluster.namespace, {"metadata": {"ownerReferences": [owner]}}
        )
    except LlmkitError as error:
        if not _is(error, 404):
            raise


def _place(settings: KubernetesSettings, cluster: Cluster, job: Mapping[str, Any]) -> Place:
    where = {"namespace": cluster.namespace, "uid": job["metadata"]["uid"], "server": cluster.server}
    return Place(job["metadata"]["name"], where | ({"context": settings.context} if settings.context else {}))


def no_order(settings: LaunchSettings, after: Sequence[str]) -> LaunchSettings:
    """``--after`` is Slurm's. UsageError where it is asked for."""
    if after:
        raise UsageError("--after: Kubernetes starts no job after another. Use --wait, or a pipeline.")
    return settings


# Finding again


def _get(cluster: Cluster, kind: Kind, name: str) -> dict[str, Any] | None:
    get = cluster.custom.get_namespaced_custom_object
    what = f"reading {kind.kind} {name} in namespace {cluster.namespace}"
    try:
        found: dict[str, Any] = cluster.call(what, get, kind.group, kind.version, cluster.namespace, kind.plural, name)
    except LlmkitError as error:
        if _is(error, 404) and isinstance(error, UsageError):
            return None
        if _is(error, 404):
            raise MissingError(
                f"The cluster has no {kind.kind} ({kind.api_version}): {kind.owner} is not installed there."
            ) from error
        raise
    return found


def cluster_of_record(record: Record) -> Cluster:
    return Cluster(record.where.get("context"), record.where.get("namespace"))


def find(kind: Kind, record: Record) -> Place | None:
    """The job of a submission whose answer never arrived. The frozen recipe says which cluster it went to."""
    frozen = yaml.safe_load((record.output_dir / rundir.RECIPE).read_text(encoding="utf-8"))
    asked = frozen["launch"]["kubernetes"]
    settings = KubernetesSettings(context=asked["context"], namespace=asked["namespace"])
    cluster = cluster_of(settings)
    job = _get(cluster, kind, names.job_name(record.name, record.token))
    if job is None or job["metadata"]["labels"].get(names.TOKEN) != record.token:
        return None
    _own(cluster, kind, job)
    return _place(settings, cluster, job)


def cancel(kind: Kind, record: Record) -> None:
    """Delete the job; its pods follow."""
    cluster = cluster_of_record(record)
    delete = cluster.custom.delete_namespaced_custom_object
    where = (kind.group, kind.version, cluster.namespace, kind.plural, record.id)
    only = {"preconditions": {"uid": record.where["uid"]}, "propagationPolicy": "Background"}
    try:
        cluster.call(f"deleting {kind.kind} {record.id}", delete, *where, body=only)
    except LlmkitError as error:
        if not _is(error, 404):
            raise


def pods_of(kind: Kind, cluster: Cluster, record: Record) -> list[Any]:
    """The job's pods, the first (Master) first."""
    selector = f"{kind.pod_label}={record.id}"
    found = cluster.call("listing pods", cluster.core.list_namespaced_pod, cluster.namespace, label_selector=selector)
    return sorted(found.items, key=lambda pod: pod.metadata.name)


def wait_for_change(kind: Kind, record: Record, seconds: float) -> None:
    """Return when the server tells of a change of the job, or after ``seconds``. A watch that breaks counts as a change."""
    from kubernetes.watch import Watch

    cluster = cluster_of_record(record)
    began = time.monotonic()
    try:
        job = _get(cluster, kind, record.id)
        if job is None:
            return
        changes = Watch().stream(
            cluster.custom.list_namespaced_custom_object, kind.group, kind.version, cluster.namespace, kind.plural,
            field_selector=f"metadata.name={record.id}", resource_version=job["metadata"]["resourceVersion"],
            timeout_seconds=max(1, round(seconds)), _request_timeout=(TIMEOUT_S[0], seconds + 5),
        )  # fmt: skip
        next(iter(changes), None)
    except Exception as error:
        if translated(error, "watching", cluster.server) is None and not isinstance(error, LlmkitError):
            raise
        time.sleep(max(0.0, min(1.0, seconds - (time.monotonic() - began))))


# How it stands


def status(kind: Kind, record: Record) -> JobStatus:
    """By the operator's conditions; the reason for waiting and the exit code by the pods."""
    if not record.id:
        raise MissingError("its submission was interrupted: the same command submits it, or finds its job")
    cluster = cluster_of_record(record)
    job = _get(cluster, kind, record.id)
    if job is None or job["metadata"]["uid"] != record.where["uid"]:
        return JobStatus(
            "cancelled", "the job is no longer on the cluster: it was deleted, or its time to live is over"
        )
    known = by_conditions(job, kind)
    pods = pods_of(kind, cluster, record)
    codes = [code for pod in pods if (code := _exit_code(pod)) is not None]
    restarts = sum(c.restart_count for pod in pods for c in pod.status.container_statuses or [])
    if known.state == "queued" and (why := _why_waiting(pods)):
        return JobStatus("queued", why)
    if known.state == "failed" and (why := _disrupted(pods)):
        return JobStatus("preempted", why, max(codes, default=None), restarts)
    code = 0 if known.state == "done" else max(codes, default=None) if known.final else None
    return JobStatus(known.state, known.reason, code, restarts)


def by_conditions(job: Mapping[str, Any], kind: Kind) -> JobStatus:
    """What the operator says of a job. ``kind`` tells who says nothing where nothing is said."""
    now = {c["type"]: c for c in job.get("status", {}).get("conditions", []) if c["status"] == "True"}
    for name, state in (("Succeeded", "done"), ("Complete", "done"), ("Failed", "failed")):
        if name in now:
            late = state == "failed" and "DeadlineExceeded" in now[name].get("reason", "") + now[name].get(
                "message", ""
            )
            return JobStatus("timed_out" if late else state, _words(now[name]) if state != "done" else "")  # type: ignore[arg-type]
    if "Suspended" in now or job["spec"].get("suspend") or job["spec"].get("runPolicy", {}).get("suspend"):
        queue = job["metadata"].get("labels", {}).get(names.QUEUE)
        return JobStatus("queued", f"waits in Kueue's queue {queue}" if queue else "suspended")
    if "Running" in now or any(one.get("active") for one in job.get("status", {}).get("jobsStatus", [])):
        return JobStatus("running")
    if "Restarting" in now:
        return JobStatus("queued", _words(now["Restarting"]))
    if not job.get("status", {}).get("conditions") and _age_s(job) > 60:
        return JobStatus("queued", f"nobody has looked at the job for {_age_s(job):.0f} s: is {kind.owner} running?")
    return JobStatus("queued")


def _words(condition: Mapping[str, Any]) -> str:
    message = str(condition.get("message", "")).strip().rstrip(".")
    return message or str(condition.get("reason", ""))


def _age_s(job: Mapping[str, Any]) -> float:
    made = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    return (datetime.now(UTC) - made).total_seconds()


def _exit_code(pod: Any) -> int | None:
    for container in pod.status.container_statuses or []:
        if container.state is not None and container.state.terminated is not None:
            return int(container.state.terminated.exit_code)
    return None


def _why_waiting(pods: Sequence[Any]) -> str:
    """Why a pod does not run, in the scheduler's or the kubelet's words."""
    for pod in pods:
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                return f"{pod.metadata.name}: {condition.message or condition.reason}"
        for container in pod.status.container_statuses or []:
            waiting = container.state.waiting if container.state else None
            if waiting is not None and waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
                return f"{pod.metadata.name}: {waiting.reason}" + (f": {waiting.message}" if waiting.message else "")
    return ""


def _disrupted(pods: Sequence[Any]) -> str:
    """Why the cluster took a pod away; ``""`` where it did not."""
    for pod in pods:
        if pod.status.reason in ("Preempted", "Preempting", "Evicted", "NodeLost", "Shutdown"):
            return f"{pod.metadata.name}: {pod.status.message or pod.status.reason}"
        for condition in pod.status.conditions or []:
            if condition.type == "DisruptionTarget" and condition.status == "True":
                return f"{pod.metadata.name}: {condition.message or condition.reason}"
    return ""
