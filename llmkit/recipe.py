"""Recipes: the typed, frozen settings of a stage, and the YAML file that is their written form."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A block of a recipe: frozen, without unknown keys, each field documented by the string below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False)


class TrackingSettings(Settings):
    enabled: bool = True
    """False keeps the metrics in the output folder only."""
    uri: str | None = None
    """MLflow tracking URI; None takes MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db`` in the working directory."""
    experiment: str | None = None
    """MLflow experiment; None takes MLFLOW_EXPERIMENT_NAME, else ``llmkit``."""
    run_name: str | None = None
    """Name of the run; None takes the recipe's ``name``."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""
    log_model: bool = False
    """Store the finished model in MLflow with a signature."""
    register: str | None = None
    """Register the stored model under this name; implies ``log_model``."""
    alias: str | None = None
    """Alias given to the registered version, e.g. ``candidate``."""
    system_metrics: bool = True
    """Sample CPU, memory, disk and GPU while the run lasts."""


class Recipe(Settings):
    """What every stage has."""

    name: str
    """Name of the run, in the tracker and in messages."""
    seed: int = 0
    """Seed of everything random: order, dropout, initial weights, samples."""
    output_dir: str
    """Folder of the run. An existing run of the same recipe is resumed, of another recipe is refused."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run is recorded."""
