"""The pod that a run's processes live in, made of the typed models of the kubernetes client.

Its command is ``python -m llmkit.processes.node``, which starts torchrun (or llmkit itself for one process) and ends with
the run's own exit code: torchrun ends with 1 whatever happened, and the operator's ExitCode policy reads the number.
torchrun gets no address and no number: the operator says them in ``PET_*``.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import yaml

from llmkit.errors import MissingError
from llmkit.kube import names
from llmkit.launch.job import Job
from llmkit.launch_settings.kubernetes import RECIPE_FOLDER, KubernetesSettings

RECIPE_FILE = f"{RECIPE_FOLDER}/recipe.yaml"


def models() -> Any:
    """``kubernetes.client``, imported on first use. ``MissingError`` where it is not installed."""
    try:
        import kubernetes.client
    except ModuleNotFoundError as error:
        raise MissingError("Kubernetes needs the package kubernetes: pip install 'llmkit[k8s]'") from error
    return kubernetes.client


def command(job: Job, settings: KubernetesSettings) -> list[str]:
    """The container's command, as a list: no shell reads it."""
    begin = ["python", "-m", "llmkit.processes.node", "--output", names.folder_of(job)]
    if by_config_map(job, settings):
        begin += ["--stage", job.stage, "--recipe", RECIPE_FILE]
    program, *rest = job.argv
    several = job.resources.processes > 1 or settings.elastic is not None
    return [*begin, "--", *(["torchrun", "-m", "llmkit"] if several else [program]), *rest]


def by_config_map(job: Job, settings: KubernetesSettings) -> bool:
    """A run in an object store has its recipe there."""
    return settings.recipe_by == "config_map" and not job.remote


def literally(text: str) -> str:
    """Kubernetes expands ``$(NAME)`` in commands and variables; ``$$(`` stays what it is."""
    return text.replace("$(", "$$(")


def environment(job: Job, settings: KubernetesSettings) -> list[Any]:
    k8s = models()
    plain = {"PYTHONUNBUFFERED": "1", **job.env, **settings.env}
    found = [k8s.V1EnvVar(name=name, value=literally(value)) for name, value in plain.items()]
    for secret in settings.secrets:
        reference = k8s.V1SecretKeySelector(name=secret.name, key=secret.key)
        source = k8s.V1EnvVarSource(secret_key_ref=reference)
        found.append(k8s.V1EnvVar(name=secret.env, value_from=source))
    return found


def resources(settings: KubernetesSettings) -> Any:
    """The same amounts as request and as limit: a pod that trains is never the first to be evicted."""
    amounts = {key: str(value) for key, value in (("cpu", _plain(settings.cpu)), ("memory", settings.memory)) if value}
    if settings.gpus:
        amounts[settings.gpu_kind] = str(settings.gpus)
    amounts |= settings.resources
    return models().V1ResourceRequirements(requests=dict(amounts), limits=dict(amounts)) if amounts else None


def _plain(cpu: str | float | None) -> str | None:
    return f"{cpu:g}" if isinstance(cpu, float | int) else cpu


def volumes(name: str, job: Job, settings: KubernetesSettings) -> tuple[list[Any], list[Any]]:
    """The pod's volumes, and where its container mounts them."""
    k8s = models()
    made = []
    for claim in dict.fromkeys(volume.claim for volume in settings.volumes):
        source = k8s.V1PersistentVolumeClaimVolumeSource(claim_name=claim)
        made.append(k8s.V1Volume(name=_volume_name(claim, settings), persistent_volume_claim=source))
    mounts = [
        k8s.V1VolumeMount(
            name=_volume_name(volume.claim, settings), mount_path=volume.mount_path, sub_path=volume.sub_path,
            read_only=volume.read_only or None,
        )
        for volume in settings.volumes
    ]  # fmt: skip
    if settings.shared_memory is not None:
        memory = k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=settings.shared_memory)
        made.append(k8s.V1Volume(name="shared-memory", empty_dir=memory))
        mounts.append(k8s.V1VolumeMount(name="shared-memory", mount_path="/dev/shm"))
    if by_config_map(job, settings):
        recipe = k8s.V1ConfigMapVolumeSource(name=names.config_map_name(name))
        made.append(k8s.V1Volume(name="recipe", config_map=recipe))
        mounts.append(k8s.V1VolumeMount(name="recipe", mount_path=RECIPE_FOLDER, read_only=True))
    return made, mounts


def _volume_name(claim: str, settings: KubernetesSettings) -> str:
    """Volumes have DNS-1123 labels for names, claims may be longer and have dots."""
    claims = list(dict.fromkeys(volume.claim for volume in settings.volumes))
    return f"claim-{claims.index(claim)}"


def working_dir(job: Job, settings: KubernetesSettings) -> str | None:
    """The folder that relative paths of the recipe begin in, where the pod has it; else the image's own."""
    cwd = PurePosixPath(job.cwd)
    there = any(cwd.is_relative_to(volume.mount_path) for volume in settings.volumes if volume.sub_path is None)
    return str(cwd) if there else None


def container(name: str, job: Job, settings: KubernetesSettings, title: str) -> Any:
    k8s = models()
    _, mounts = volumes(name, job, settings)
    sources = [k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=secret)) for secret in settings.env_from]
    return k8s.V1Container(
        name=title, image=settings.image, image_pull_policy=settings.image_pull_policy,
        command=[literally(part) for part in command(job, settings)], working_dir=working_dir(job, settings),
        env=environment(job, settings), env_from=sources or None, resources=resources(settings),
        volume_mounts=mounts or None, security_context=container_security(),
    )  # fmt: skip


def container_security() -> Any:
    k8s = models()
    return k8s.V1SecurityContext(allow_privilege_escalation=False, capabilities=k8s.V1Capabilities(drop=["ALL"]))


def pod_security(settings: KubernetesSettings) -> Any:
    """What the Pod Security Standard ``restricted`` demands: not root, the runtime's own seccomp profile."""
    k8s = models()
    return k8s.V1PodSecurityContext(
        run_as_non_root=True, run_as_user=settings.run_as_user, fs_group=settings.fs_group,
        seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
    )  # fmt: skip


def tolerations(settings: KubernetesSettings) -> list[Any]:
    k8s = models()
    return [
        k8s.V1Toleration(
            key=taint.key, operator=taint.operator, value=taint.value, effect=taint.effect,
            toleration_seconds=taint.toleration_seconds,
        )
        for taint in settings.tolerations
    ]  # fmt: skip


def pod_template(name: str, job: Job, settings: KubernetesSettings, title: str = "pytorch") -> Any:
    k8s = models()
    made, _ = volumes(name, job, settings)
    pulls = [k8s.V1LocalObjectReference(name=secret) for secret in settings.image_pull_secrets]
    spec = k8s.V1PodSpec(
        containers=[container(name, job, settings, title)], volumes=made or None, image_pull_secrets=pulls or None,
        service_account_name=settings.service_account, automount_service_account_token=False,
        node_selector=settings.node_selector or None, tolerations=tolerations(settings) or None,
        affinity=settings.affinity, priority_class_name=settings.priority_class,
        security_context=pod_security(settings), termination_grace_period_seconds=settings.grace_seconds,
    )  # fmt: skip
    metadata = k8s.V1ObjectMeta(labels=names.labels_of(job, settings), annotations=names.annotations_of(job, settings))
    return k8s.V1PodTemplateSpec(metadata=metadata, spec=spec)


def config_map(name: str, job: Job, settings: KubernetesSettings) -> dict[str, Any]:
    k8s = models()
    metadata = k8s.V1ObjectMeta(
        name=names.config_map_name(name), namespace=settings.namespace, labels=names.labels_of(job, settings)
    )
    return plain(
        k8s.V1ConfigMap(api_version="v1", kind="ConfigMap", metadata=metadata, data={"recipe.yaml": job.recipe})
    )


def plain(model: Any) -> dict[str, Any]:
    """A typed model as the JSON object that the API server takes."""
    data: dict[str, Any] = models().ApiClient().sanitize_for_serialization(model)
    return data


# Text


class _Dumper(yaml.SafeDumper):
    """No anchors, and every text that some reader could take for something else in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    odd = any(c in "\r\x85\u2028\u2029\t" for c in text)  # PyYAML's other styles read these back as line feeds
    style = "|" if "\n" in text and not odd else None if _is_plain(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_plain(text: str) -> bool:
    """Whether every YAML reader, 1.1 or 1.2, takes the bare word for this text."""
    words = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "~", ""}
    first = text[:1].isascii() and (text[:1].isalpha() or text[:1] in "/.")
    return first and text.isprintable() and text.lower() not in words and not text.startswith(".")


_Dumper.add_representer(str, _text)


def as_yaml(objects: list[dict[str, Any]]) -> str:
    """Objects as one YAML stream, for ``kubectl apply -f -``."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
