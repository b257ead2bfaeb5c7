"""Jobs and settings that the tests of the launchers on Kubernetes share: a plain one, and one that uses every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.launch.job import Job, Resources
from llmkit.launch_settings import LaunchSettings

PLAIN: dict[str, Any] = {"launcher": "pytorchjob", "kubernetes": {"image": "llmkit:0.1.0"}}

FULL: dict[str, Any] = {
    "launcher": "pytorchjob", "nodes": 3,
    "kubernetes": {
        "namespace": "team-a", "image": "llmkit:0.1.0", "image_pull_policy": "IfNotPresent",
        "image_pull_secrets": ["pull"], "service_account": "llmkit-run", "cpu": 7.5, "memory": "64Gi", "gpus": 2,
        "gpu_kind": "amd.com/gpu", "resources": {"rdma/hca": "1"}, "shared_memory": "8Gi",
        "volumes": [
            {"claim": "runs", "mount_path": "/runs"},
            {"claim": "data.v2", "mount_path": "/data", "read_only": True, "sub_path": "sets/one"},
        ],
        "secrets": [
            {"env": "AWS_ACCESS_KEY_ID", "name": "objects", "key": "id"},
            {"env": "AWS_SECRET_ACCESS_KEY", "name": "objects", "key": "secret"},
            {"env": "HF_TOKEN", "name": "hub", "key": "token"},
        ],
        "env_from": ["mlflow"], "env": {"NCCL_DEBUG": "INFO", "MOTTO": 'it\'s "$(HOME)" — $HOME\nyes'},
        "node_selector": {"gpu": "mi300"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "llmkit"}},
        }]}},
        "run_as_user": 1234, "fs_group": 1234, "priority_class": "high", "labels": {"team": "a"},
        "annotations": {"example.org/note": "two words: yes"}, "queue": "training", "recipe_by": "config_map",
        "grace_seconds": 120, "suspend": True, "active_deadline_seconds": 86400, "backoff_limit": 5,
        "ttl_seconds_after_finished": 3600, "clean_pod_policy": "Running",
        "scheduling": {"min_available": 3, "queue": "batch", "priority_class": "gang", "schedule_timeout_seconds": 600},
    },
}  # fmt: skip

ELASTIC: dict[str, Any] = {
    "launcher": "pytorchjob", "nodes": 2,
    "kubernetes": {
        "image": "llmkit:0.1.0", "recipe_by": "volume", "shared_memory": None,
        "elastic": {"min_nodes": 1, "max_nodes": 4, "max_restarts": 7},
    },
}  # fmt: skip

RECIPE = "name: 'it''s'\nseed: 0\noutput_dir: /runs/it's a \"run\"\n"
TOKEN = "0123456789abcdef0123456789abcdef"  # a submission's, no secret


def settings(given: dict[str, Any], **kubernetes: Any) -> LaunchSettings:
    return LaunchSettings.model_validate(given | {"kubernetes": given["kubernetes"] | kubernetes})


def job(
    nodes: int = 1, processes: int = 1, *, name: str = "it's a $(run) — é", folder: str = '/runs/it\'s a "run"'
) -> Job:
    return Job(
        ("llmkit", "run", f"{folder}/recipe.yaml"), Path(folder), Path("/runs"), resources=Resources(nodes, processes),
        name=name, stage="sft", token=TOKEN, recipe=RECIPE,
    )  # fmt: skip
