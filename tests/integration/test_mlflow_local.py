"""Tracking with no server: the sqlite default, a file store, and files that the store does not get."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from llmkit.recipe import TrackingSettings
from llmkit.tracking import open_tracker, read_metrics, sync
from llmkit.tracking.state import load_state


def test_the_default_works_with_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of the default store lies beside ``mlflow.db`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "a"
    tracker = open_tracker(TrackingSettings(), output_dir=run, name="default", stage="sft")
    tracker.metrics({"loss": 1.0}, 1)
    (run / "result.json").write_text("{}")
    tracker.artifact(run / "result.json")
    (run / "gone.txt").write_text("x")
    tracker.artifact(run / "gone.txt")
    (run / "gone.txt").unlink()
    tracker.close("done")
    sync_report = sync(run)
    assert sync_report.run_id == tracker.run_id
    assert {p.name for p in tmp_path.iterdir()} == {"mlflow.db", "mlruns", "runs"}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(str(tracker.run_id))
    assert found.info.status == "FINISHED" and found.data.metrics["loss"] == 1.0
    assert found.info.artifact_uri.startswith((tmp_path / "mlruns" / "llmkit").as_uri())
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["result.json"]
    (refused,) = load_state(run).failed
    assert "gone.txt" in refused["what"] and sync_report.left == 1
    (run / "gone.txt").write_text("x")
    assert sync(run).left == 0


def test_nothing_is_printed_on_stdout(tmp_path: Path) -> None:
    """It belongs to ``--json``."""
    script = """
from pathlib import Path
from llmkit.recipe import TrackingSettings
from llmkit.tracking import open_tracker
t = open_tracker(TrackingSettings(), output_dir=Path("run"), name="r", stage="sft")
t.metrics({"a": 1.0}, 1)
t.close("done")
assert t.run_id, "not sent"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_a_file_store_gets_every_point_once(tmp_path: Path) -> None:
    """File stores append whatever they are sent, so what is sent again is compared first."""
    run, uri = tmp_path / "run", (tmp_path / "mlruns").as_uri()
    settings = TrackingSettings(uri=uri, system_metrics=False)
    tracker = open_tracker(settings, output_dir=run, name="files", stage="sft")
    for step in range(20):
        tracker.metrics({"loss": float(step), "nan": float("nan")}, step)
    tracker.close("done")
    state = load_state(run)
    state.sent = 0
    state.save(run)
    sync(run)
    client = MlflowClient(uri)
    found = client.get_metric_history(str(tracker.run_id), "loss")
    assert Counter((m.step, m.value) for m in found) == Counter((s, m["loss"]) for s, _, m in read_metrics(run))
    assert len(client.get_metric_history(str(tracker.run_id), "nan")) == 20


def test_sync_to_another_store_sends_the_whole_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    settings = TrackingSettings(enabled=False, system_metrics=False, experiment="later")
    tracker = open_tracker(settings, output_dir=run, name="off", stage="sft")
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("done")
    for name in ("a", "b"):
        report = sync(run, f"sqlite:///{name}.db")
        client = MlflowClient(f"sqlite:///{tmp_path}/{name}.db")
        assert report.left == 0 and client.get_run(report.run_id).data.metrics["loss"] == 1.0
        assert client.get_experiment_by_name("later") is not None
