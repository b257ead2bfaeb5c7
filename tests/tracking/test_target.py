"""Where the events of a run go: the recipe first, then MLflow's environment variables, then the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.recipe import TrackingSettings
from llmkit.tracking.target import target_of


def test_defaults_need_nothing_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = target_of(TrackingSettings(), "name")
    assert (target.uri, target.experiment) == (f"sqlite:///{tmp_path}/mlflow.db", "llmkit")
    assert (target.name, target.run_id, target.registry_uri) == ("name", None, None)


def test_the_environment_is_honoured_and_the_recipe_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of-the-shell")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    target = target_of(TrackingSettings(), "name")
    assert (target.uri, target.experiment, target.run_id) == ("http://tracker:5000", "of-the-shell", "abc")
    assert target.registry_uri == "http://registry:5000"
    named = target_of(TrackingSettings(uri="http://other", experiment="mine", run_name="first"), "name")
    assert (named.uri, named.experiment, named.name) == ("http://other", "mine", "first")
