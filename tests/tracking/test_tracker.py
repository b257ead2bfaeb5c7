"""[27], the tracker without a server: nothing blocks, nothing is lost, nothing heavy is imported."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.errors import UsageError
from llmkit.recipe import TrackingSettings
from llmkit.tracking import open_tracker, read_metrics, sync
from llmkit.tracking.facts import git_facts, start_tags
from llmkit.tracking.spool import LOG_NAME, read
from llmkit.tracking.system import Sampler


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """A port that accepts connections and never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(50)
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                kept.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in kept:
        connection.close()


def test_a_server_that_hangs_costs_no_time(hanging_server: str, tmp_path: Path) -> None:
    notes: list[str] = []
    settings = TrackingSettings(uri=hanging_server, system_metrics=False)
    tracker = open_tracker(settings, output_dir=tmp_path, name="r", stage="sft", note=notes.append)
    time.sleep(3)  # mlflow is imported and its first request hangs
    began = time.monotonic()
    for step in range(200):
        tracker.metrics({"loss": 1.0}, step)
    tracker.params({"a": 1})
    tracker.artifact(tmp_path / LOG_NAME)
    calls = time.monotonic() - began
    tracker.close("done")
    assert calls < 2
    assert time.monotonic() - began < 45
    assert len(list(read_metrics(tmp_path))) == 200
    assert notes and f"llmkit sync {tmp_path}" in notes[-1]


def test_disabled_tracking_keeps_the_log(tmp_path: Path) -> None:
    settings = TrackingSettings(enabled=False, system_metrics=False, tags={"a": "b"}, log_model=True)
    tracker = open_tracker(settings, output_dir=tmp_path / "run", name="r", stage="sft")
    assert tracker.run_id is None
    tracker.metrics({"loss": float("nan")}, 1)
    tracker.model(tmp_path, {"prompt": "a", "answer": "b"})
    with pytest.raises(UsageError, match="still sending"):
        sync(tmp_path / "run")
    tracker.close("done")
    tracker.close("done")
    kinds = [e.kind for e in read(tmp_path / "run" / LOG_NAME)]
    assert kinds[0] == "start" and kinds[-1] == "status" and {"tags", "metrics", "model"} <= set(kinds)
    assert not (tmp_path / "run" / "tracking.json").exists()


def test_opening_imports_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from llmkit.recipe import TrackingSettings
from llmkit.tracking import open_tracker
t = open_tracker(TrackingSettings(enabled=False), output_dir=Path({str(tmp_path)!r}), name="r", stage="sft")
t.metrics({{"a": 1.0}}, 1)
t.close("done")
print([m for m in ("mlflow", "torch", "numpy", "pandas", "transformers", "requests") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_facts_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llmkit", "sft", "r.yaml", "--token", "abc"])
    tags = start_tags("sft", tmp_path)
    assert tags["llmkit.command"] == "llmkit sft r.yaml --token ***"
    assert tags["version.python"].startswith("3.") and tags["version.mlflow"] and "mlflow.user" not in tags

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *words], check=True)

    assert git_facts(tmp_path) == {}
    git("init", "-q")
    git("remote", "add", "origin", "https://bob:pw@host/repo.git")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "one")
    facts = git_facts(tmp_path)
    assert len(facts["mlflow.source.git.commit"]) == 40 and facts["llmkit.git.dirty"] == "false"
    assert facts["mlflow.source.git.repoURL"] == "https://host/repo.git"
    (tmp_path / "f").write_text("2")
    assert git_facts(tmp_path)["llmkit.git.dirty"] == "true"


def test_system_metrics(tmp_path: Path) -> None:
    got: list[tuple[dict[str, float], int]] = []
    both = threading.Event()

    def write(metrics: dict[str, float], step: int) -> None:
        got.append((metrics, step))
        if len(got) == 2:
            both.set()

    sampler = Sampler(write, tmp_path, began_s=time.time() - 100, interval_s=0.2)
    sampler.start()
    assert both.wait(30)
    sampler.stop()
    metrics, step = got[0]
    assert metrics["system/process_tree_resident_megabytes"] > 1 and step >= 100
    assert 0 <= metrics["system/disk_usage_percentage"] <= 100 and metrics["system/system_memory_usage_megabytes"] > 0


def test_artifacts_of_the_run_are_written_relative(tmp_path: Path) -> None:
    settings = TrackingSettings(enabled=False, system_metrics=False)
    tracker = open_tracker(settings, output_dir=tmp_path / "run", name="r", stage="sft")
    tracker.artifact(tmp_path / "run" / "result.json")
    tracker.artifact(tmp_path / "other.txt", "notes")
    tracker.close("failed")
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG_NAME).read_text().splitlines()]
    paths = [(line["path"], line["folder"]) for line in lines if line["event"] == "artifact"]
    assert paths == [("result.json", ""), (str(tmp_path / "other.txt"), "notes")]
