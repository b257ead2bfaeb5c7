"""What the training operator's webhook would refuse, found before anything is submitted and said in llmkit's words.

The rules are those of kubeflow/training-operator 1.9 (``pytorchjob_webhook.go``); a schema cannot say them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.errors import Problem, RecipeError, UsageError
from llmkit.kube.pods import models
from llmkit.launch.job import Job
from llmkit.launch_settings import LaunchSettings

_WHERE = "launch"


def check(settings: LaunchSettings, launcher: str) -> None:
    """``RecipeError`` with all that a launcher on Kubernetes cannot do with these settings."""
    problems = [Problem(_WHERE, key, message, hint) for key, message, hint in _mistakes(settings, launcher)]
    if problems:
        raise RecipeError(problems)


def _mistakes(settings: LaunchSettings, launcher: str) -> Iterator[tuple[str, str, str]]:
    kube = settings.kubernetes
    if kube.image is None:
        yield (
            "launch.kubernetes.image",
            f"--launcher {launcher} needs the image of the pods",
            "k8s/image/Dockerfile makes one",
        )
    if settings.processes != "auto" and 0 < kube.gpus < settings.processes:
        hint = "one process for each GPU: launch.processes: auto"
        yield "launch.processes", f"is {settings.processes}, but a pod has {kube.gpus} GPUs", hint
    if kube.affinity is not None:
        for key in unknown_keys(models().V1Affinity, kube.affinity, "launch.kubernetes.affinity"):
            yield key, "is no key of a Kubernetes affinity", "keys are written as Kubernetes writes them: nodeAffinity"
    if launcher != "pytorchjob":
        for key in ("elastic", "scheduling"):
            if getattr(kube, key) is not None:
                yield f"launch.kubernetes.{key}", f"is the PyTorchJob's; --launcher {launcher} has no such thing", ""
        return
    yield from _elastic(settings)
    if kube.scheduling is not None and (kube.scheduling.min_available or 0) > settings.nodes:
        hint = "None is all of them"
        yield "launch.kubernetes.scheduling.min_available", f"is more than the {settings.nodes} pods", hint


def _elastic(settings: LaunchSettings) -> Iterator[tuple[str, str, str]]:
    elastic = settings.kubernetes.elastic
    if elastic is not None and not elastic.min_nodes <= settings.nodes <= elastic.max_nodes:
        bounds = f"{elastic.min_nodes} to {elastic.max_nodes}"
        yield "launch.nodes", f"is {settings.nodes}, outside of launch.kubernetes.elastic ({bounds})", ""


def unknown_keys(model: Any, value: Any, where: str) -> Iterator[str]:
    """Dotted keys of a mapping that a typed model does not have, however deep."""
    if not isinstance(value, Mapping):
        return
    kinds = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
    for key, item in value.items():
        if key not in kinds:
            yield f"{where}.{key}"
            continue
        inner = re.search(r"V1\w+", kinds[key])
        found = getattr(models(), inner.group(), None) if inner else None
        if found is not None:
            for i, one in enumerate(item) if isinstance(item, list) else [(None, item)]:
                yield from unknown_keys(found, one, f"{where}.{key}" if i is None else f"{where}.{key}.{i}")


def no_sweep(job: Job) -> None:
    """A sweep is one array of Slurm; here each of its runs is a job of its own."""
    if job.sweep:
        raise UsageError("A sweep is an array of Slurm's. On Kubernetes submit its runs one by one.")
