"""Tracking against a real MLflow server that is started, stopped and killed here. Field lessons 27, 28 and 34."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from llmkit.errors import MissingError, UsageError
from llmkit.recipe import TrackingSettings
from llmkit.tracking import open_tracker, read_metrics, sync
from llmkit.tracking.state import load_state

pytestmark = pytest.mark.server


def settings(uri: str, **more: Any) -> TrackingSettings:
    return TrackingSettings(**({"uri": uri, "experiment": "tracking-tests", "system_metrics": False} | more))


def points(client: MlflowClient, run_id: str, key: str) -> Counter[tuple[int, int, float]]:
    return Counter((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key))


def logged(folder: Path, key: str) -> Counter[tuple[int, int, float]]:
    return Counter((step, time_ms, metrics[key]) for step, time_ms, metrics in read_metrics(folder) if key in metrics)


def wait_for(what: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_a_run_with_everything_arrives(mlflow_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value-1")
    run = tmp_path / "run"
    tracker = open_tracker(settings(mlflow_server.uri, tags={"team": "nlp"}), output_dir=run, name="all", stage="sft")
    tracker.params({"model": {"name_or_path": "x"}, "train": {"learning_rate": 2e-5}, "hf_token": "hf_" + "a" * 30})
    tracker.params({"long": "ä" * 9000, "k" * 400: "v", "odd*name": "1"} | {f"many.{i}": i for i in range(350)})
    tracker.tags({"note": "x" * 9000, "env": "key very-secret-value-1"})
    for step in range(2500):
        tracker.metrics({"loss": 1.0 / (step + 1), "odd(name)": 1.0}, step)
    tracker.metrics({"loss": math.nan, "up": math.inf}, 2500)
    (run / "plots").mkdir()
    (run / "plots" / "loss.png").write_bytes(b"png")
    (run / "result.json").write_text("{}")
    tracker.artifact(run / "plots")
    tracker.artifact(run / "result.json", "results")
    tracker.dataset("gsm8k", "sha256:" + "0" * 64, "s3://user:pw@bucket/rows.jsonl", "train", {"rows": 10})
    tracker.close("done")

    client = MlflowClient(mlflow_server.uri)
    assert tracker.run_id is not None
    found = client.get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "all"
    params, tags = found.data.params, found.data.tags
    assert params["train.learning_rate"] == "2e-05"
    assert params["hf_token"] == "***"
    assert all(params[f"many.{i}"] == str(i) for i in range(350))
    assert len(params["long"]) == 6000 and "whole in params_full.json" in params["long"]
    assert tags["team"] == "nlp" and tags["env"] == "key ***" and tags["llmkit.stage"] == "sft"
    assert "version.torch" in tags and "mlflow.source.git.commit" in tags
    full = json.loads(Path(client.download_artifacts(found.info.run_id, "params_full.json", str(tmp_path))).read_text())
    assert (
        full["params"]["long"] == "ä" * 9000 and full["params"]["k" * 400] == "v" and len(full["tags"]["note"]) == 9000
    )
    history = client.get_metric_history(found.info.run_id, "loss")
    assert len(history) == 2501 and math.isnan(history[-1].value)
    assert client.get_metric_history(found.info.run_id, "up")[0].value > 1e308
    names = {f.path for folder in ("plots", "results") for f in client.list_artifacts(found.info.run_id, folder)}
    assert names == {"plots/loss.png", "results/result.json"}
    (data,) = found.inputs.dataset_inputs
    assert data.dataset.name == "gsm8k" and "pw" not in data.dataset.source
    assert data.tags[0].value == "train" and json.loads(data.dataset.profile)["rows"] == 10
    written = (run / "log.jsonl").read_text() + (run / "tracking.json").read_text()
    assert "very-secret" not in written and "user:pw" not in written and "hf_aaa" not in written
    report = sync(run)
    assert (report.sent, report.left) == (0, 0)


def test_sending_again_changes_nothing(mlflow_server: Any, tmp_path: Path) -> None:
    """As after a kill between a call and the note that it was made."""
    run = tmp_path / "run"
    tracker = open_tracker(settings(mlflow_server.uri), output_dir=run, name="again", stage="sft")
    tracker.params({"a": 1, "long": "x" * 7000})
    for step in range(50):
        tracker.metrics({"loss": float(step), "nan": math.nan}, step)
    tracker.dataset("d", "1", "file", "train", {})
    tracker.close("done")
    client = MlflowClient(mlflow_server.uri)
    before = client.get_run(str(tracker.run_id))
    for _ in range(2):
        state = load_state(run)
        state.sent = 0
        state.save(run)
        assert sync(run).left == 0
    assert points(client, str(tracker.run_id), "loss") == logged(run, "loss")
    assert len(client.get_metric_history(str(tracker.run_id), "nan")) == 50
    after = client.get_run(str(tracker.run_id))
    assert after.data.params == before.data.params and len(after.inputs.dataset_inputs) == 1
    assert after.info.status == "FINISHED"


def test_a_resumed_run_is_the_same_run(mlflow_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    client = MlflowClient(mlflow_server.uri)
    first = open_tracker(settings(mlflow_server.uri), output_dir=run, name="r", stage="sft")
    first.params({"max_steps": 1})
    first.metrics({"loss": 2.0}, 1)
    first.close("stopped")
    assert client.get_run(str(first.run_id)).info.status == "KILLED"
    second = open_tracker(settings(mlflow_server.uri), output_dir=run, name="r", stage="sft")
    assert second.run_id == first.run_id
    second.params({"max_steps": 2})
    wait_for(lambda: client.get_run(str(first.run_id)).info.status == "RUNNING")
    with pytest.raises(UsageError, match="still sending"):
        sync(run)
    second.metrics({"loss": 1.0}, 2)
    second.close("done")
    found = client.get_run(str(first.run_id))
    assert found.info.status == "FINISHED"
    assert found.data.params["max_steps"] == "1" and found.data.tags["llmkit.changed.max_steps"] == "2"
    assert [m.value for m in client.get_metric_history(str(first.run_id), "loss")] == [2.0, 1.0]

    client.delete_run(str(first.run_id))
    notes: list[str] = []
    third = open_tracker(settings(mlflow_server.uri), output_dir=run, name="r", stage="sft", note=notes.append)
    third.metrics({"loss": 0.5}, 3)
    third.close("done")
    assert third.run_id != first.run_id and any("deleted" in note for note in notes)
    assert points(client, str(third.run_id), "loss") == logged(run, "loss")

    given = client.create_run(client.get_experiment_by_name("tracking-tests").experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    fourth = open_tracker(settings(mlflow_server.uri), output_dir=tmp_path / "other", name="r", stage="sft")
    fourth.metrics({"loss": 0.1}, 1)
    fourth.close("failed")
    assert fourth.run_id == given and client.get_run(given).info.status == "FAILED"


def test_a_deleted_experiment_is_named_and_nothing_is_lost(mlflow_server: Any, tmp_path: Path) -> None:
    client = MlflowClient(mlflow_server.uri)
    number = client.create_experiment("deleted-one")
    client.delete_experiment(number)
    notes: list[str] = []
    run = tmp_path / "run"
    where = settings(mlflow_server.uri, experiment="deleted-one")
    tracker = open_tracker(where, output_dir=run, name="r", stage="sft", note=notes.append)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("done")
    assert any("'deleted-one' was deleted" in note and "experiments restore" in note for note in notes)
    assert any("llmkit sync" in note for note in notes)
    client.restore_experiment(number)
    report = sync(run)
    assert report.left == 0 and points(client, report.run_id, "loss") == logged(run, "loss")
    assert client.get_run(report.run_id).info.experiment_id == number


def test_the_model_is_stored_registered_and_aliased(mlflow_server: Any, tmp_path: Path, tiny_llama: Path) -> None:
    import mlflow

    wanted = settings(mlflow_server.uri, log_model=True, register="tiny", alias="candidate")
    run = tmp_path / "run"
    tracker = open_tracker(wanted, output_dir=run, name="m", stage="sft")
    tracker.model(tiny_llama, {"prompt": "hello", "answer": "world"})
    tracker.close("done")
    client = MlflowClient(mlflow_server.uri)
    version = client.get_model_version_by_alias("tiny", "candidate")
    assert version.run_id == tracker.run_id
    state = load_state(run)
    state.sent = 0
    state.models = {}
    state.save(run)
    assert sync(run).left == 0
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    mlflow.set_tracking_uri(mlflow_server.uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/tiny@candidate")
    finally:
        mlflow.set_tracking_uri(None)
    assert loaded.metadata.signature.inputs.input_types()[0].name == "string"
    assert isinstance(loaded.predict("hello")[0], str)


def test_an_adapter_is_stored_and_answers(mlflow_server: Any, tmp_path: Path, tiny_llama: Path) -> None:
    import mlflow
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(run / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(run / "adapter")
    tracker = open_tracker(settings(mlflow_server.uri, register="ad"), output_dir=run, name="a", stage="lora")
    tracker.model(run / "adapter", {"messages": [{"role": "user", "content": "hi"}], "answer": "ho"})
    tracker.close("done")
    mlflow.set_tracking_uri(mlflow_server.uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/ad/1")
    finally:
        mlflow.set_tracking_uri(None)
    assert isinstance(loaded.predict(["hello"])[0], str)


def test_a_seq2seq_model_is_stored_and_answers(mlflow_server: Any, tmp_path: Path, tiny_t5: Path) -> None:
    import mlflow

    tracker = open_tracker(settings(mlflow_server.uri, register="s2s"), output_dir=tmp_path, name="t", stage="sft")
    tracker.model(tiny_t5, {"prompt": "hello", "answer": "world"})
    tracker.close("done")
    mlflow.set_tracking_uri(mlflow_server.uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/s2s/1")
    finally:
        mlflow.set_tracking_uri(None)
    assert isinstance(loaded.predict("hello")[0], str)


def test_killed_in_the_middle_stopped_and_restarted(own_mlflow_server: Any, tmp_path: Path) -> None:
    """Down at the start, killed in the middle, stopped (accepts, never answers): nothing lost, nothing twice."""
    server, run = own_mlflow_server, tmp_path / "run"
    notes: list[str] = []
    tracker = open_tracker(settings(server.uri), output_dir=run, name="k", stage="sft", note=notes.append)

    def log(first: int, last: int) -> None:
        for step in range(first, last):
            tracker.metrics({"loss": 1.0 / (step + 1)}, step)
            time.sleep(0.002)

    log(0, 200)
    wait_for(lambda: any("cannot be reached" in note for note in notes))
    assert tracker.run_id is None
    server.start()
    client = MlflowClient(server.uri)
    wait_for(lambda: tracker.run_id is not None, 120)
    log(200, 700)
    server.kill()
    log(700, 1200)
    server.start()
    wait_for(lambda: len(client.get_metric_history(str(tracker.run_id), "loss")) >= 1200, 150)
    server.signal(signal.SIGSTOP)
    log(1200, 1500)
    time.sleep(12)
    server.signal(signal.SIGCONT)
    log(1500, 1600)
    tracker.close("done")
    if load_state(run).sent < (run / "log.jsonl").stat().st_size:
        assert sync(run).left == 0
    assert points(client, str(tracker.run_id), "loss") == logged(run, "loss")
    assert sum(logged(run, "loss").values()) == 1600
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    assert len(client.search_runs([client.get_run(str(tracker.run_id)).info.experiment_id])) == 1


def test_a_killed_run_is_finished_by_sync(mlflow_server: Any, tmp_path: Path) -> None:
    """The process dies with kill -9 while it sends, with half a line in its log."""
    run = tmp_path / "run"
    script = f"""
import os, time
from pathlib import Path
from llmkit.recipe import TrackingSettings
from llmkit.tracking import open_tracker
t = open_tracker(TrackingSettings(uri={mlflow_server.uri!r}, experiment="tracking-tests", system_metrics=False),
                 output_dir=Path({str(run)!r}), name="killed", stage="sft")
step = 0
while True:
    t.metrics({{"loss": 1.0 / (step + 1)}}, step)
    step += 1
    time.sleep(0.001)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: (run / "tracking.json").exists() and load_state(run).sent > 0)
    process.kill()
    process.wait()
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'{"time": "2026-11-21T20:53:35.346Z", "event": "metr')
    notes: list[str] = []
    report = sync(run, note=notes.append)
    client = MlflowClient(mlflow_server.uri)
    assert report.left == 0 and any("passed over" in note for note in notes)
    assert points(client, report.run_id, "loss") == logged(run, "loss")
    assert client.get_run(report.run_id).info.status == "KILLED"


def test_never_back_then_sync_later(own_mlflow_server: Any, tmp_path: Path) -> None:
    server, run = own_mlflow_server, tmp_path / "run"
    notes: list[str] = []
    tracker = open_tracker(settings(server.uri), output_dir=run, name="later", stage="sft", note=notes.append)
    tracker.params({"a": 1})
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("done")
    assert f"llmkit sync {run}" in notes[-1]
    with pytest.raises(MissingError, match="cannot be reached"):
        sync(run)
    server.start()
    moved = run.rename(tmp_path / "moved")
    report = sync(moved)
    found = MlflowClient(server.uri).get_run(report.run_id)
    assert report.left == 0 and found.info.status == "FINISHED" and found.data.metrics["loss"] == 1.0
    assert report.url.startswith(server.uri)
    with pytest.raises(UsageError, match="no run"):
        sync(tmp_path)
