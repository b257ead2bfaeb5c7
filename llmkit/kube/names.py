"""Names and labels of what llmkit makes on a cluster."""

from __future__ import annotations

import hashlib
import re

from llmkit.launch.job import Job
from llmkit.launch_settings.kubernetes import KubernetesSettings

TOKEN, STAGE = "llmkit.io/token", "llmkit.io/stage"
RUN, FOLDER = "llmkit.io/run", "llmkit.io/output-dir"
QUEUE = "kueue.x-k8s.io/queue-name"
_TOKEN_IN_NAME = 8
_LONGEST = 63 - len("-worker-999")
"""Characters of a job's name: its pods' names are labels of services, which have 63."""


def token_of(job: Job) -> str:
    """The submission's token; a text that nobody has submitted yet has one made of the output folder."""
    return job.token or hashlib.sha256(str(job.output_dir).encode()).hexdigest()[:32]


def job_name(name: str, token: str) -> str:
    """A DNS-1035 name (small letter first, then letters, digits and ``-``) that is the same for the same submission.

    Only one job can have it, so that the API server itself refuses to make a submission's job twice.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain or not plain[0].isalpha():
        plain = f"run-{plain}".strip("-")
    return f"{plain[: _LONGEST - _TOKEN_IN_NAME - 1].rstrip('-')}-{token[:_TOKEN_IN_NAME]}"


def folder_of(job: Job) -> str:
    """The output folder as the pods name it: a path, or the URI of an object store."""
    return job.argv[2].removesuffix("/recipe.yaml") if job.remote else str(job.output_dir)


def labels_of(job: Job, settings: KubernetesSettings) -> dict[str, str]:
    """Labels of the job, its pods and its ConfigMap."""
    own = {"app.kubernetes.io/name": "llmkit", STAGE: job.stage, TOKEN: token_of(job)}
    return {**settings.labels, **own}


def annotations_of(job: Job, settings: KubernetesSettings) -> dict[str, str]:
    """Annotations: what is too free for a label, the run's name and folder."""
    return {**settings.annotations, RUN: job.name, FOLDER: folder_of(job)}


def config_map_name(name: str) -> str:
    return f"{name}-recipe"
