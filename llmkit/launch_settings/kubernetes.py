"""Settings of the launchers on Kubernetes."""

from __future__ import annotations

from llmkit.settings import Settings


class KubernetesSettings(Settings):
    """What the launchers on Kubernetes ask the cluster for."""
