"""Where the events of a run go: store, experiment, name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llmkit.recipe import TrackingSettings
from llmkit.tracking.links import absolute_uri, default_uri
from llmkit.tracking.masking import without_credentials
from llmkit.tracking.spool import LOG_NAME, read
from llmkit.tracking.state import State

DEFAULT_EXPERIMENT = "llmkit"
RUN_KEY_TAG = "llmkit.run_key"


@dataclass(frozen=True)
class Target:
    """``run_id`` is a run asked for by ``MLFLOW_RUN_ID``; None leaves it to ``tracking.json``."""

    uri: str
    experiment: str
    name: str
    run_id: str | None = None

    @property
    def registry_uri(self) -> str | None:
        return os.environ.get("MLFLOW_REGISTRY_URI")


def target_of(settings: TrackingSettings, name: str) -> Target:
    """What settings and environment say, in that order; the uri is absolute."""
    return Target(
        uri=absolute_uri(settings.uri or default_uri()),
        experiment=settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT,
        name=settings.run_name or name,
        run_id=os.environ.get("MLFLOW_RUN_ID") or None,
    )


def target_of_folder(folder: Path, state: State, uri: str | None) -> Target:
    """Where a run folder was sent before, or would have been; ``uri`` overrides it.

    A stored uri has no credentials: those of ``MLFLOW_TRACKING_URI`` are taken when it is the same store.
    """
    start = next((event.body for event in read(folder / LOG_NAME) if event.kind == "start"), {})
    stored = state.uri or str(start.get("uri", ""))
    environment = absolute_uri(default_uri())
    chosen = uri or (environment if not stored or without_credentials(environment) == stored else stored)
    experiment = state.experiment or str(start.get("experiment", "")) or DEFAULT_EXPERIMENT
    return Target(absolute_uri(chosen), experiment, str(start.get("name", folder.name)))
