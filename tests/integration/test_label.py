"""The way of a labelling job by the command line: killed, gone on with, and its labels trained on and scored again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

RunLlmkit = Callable[..., Any]

TEMPLATE = "---\nname: sign\nvariables: [{name: number, type: integer}]\n---\n{% user %}Is {{ number }} even or odd?{% enduser %}\n"
LABELS = ["even", "odd", "neither of the two"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    rows = [{"number": n % 23, "right": LABELS[n % 23 % 2]} for n in range(48)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sign.jinja").write_text(TEMPLATE)
    path = tmp_path / "label.yaml"
    path.write_text(
        yaml.safe_dump({
            "name": "sign", "output_dir": "out", "models": {"name_or_path": str(tiny_llama), "device": "cpu"},
            "templates": "sign.jinja", "labels": LABELS, "input": {"path": "rows.jsonl"},
            "output": {"rows_per_shard": 12}, "gold": {"column": "right"},
            "scoring": {"calibration": "batch", "calibration_rows": 16}, "tracking": {"enabled": False},
        })
    )  # fmt: skip
    return path


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_killed_and_gone_on_with_it_is_the_job_that_was_never_killed(
    run_llmkit: RunLlmkit, recipe: Path, tmp_path: Path
) -> None:
    assert run_llmkit("label", recipe, "output_dir=whole").code == 0
    command = [sys.executable, "-m", "llmkit", "label", str(recipe)]
    with (tmp_path / "killed.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True, env=os.environ
        )
        first = tmp_path / "out/shards/part-00000.parquet"
        end = time.monotonic() + 120
        while not first.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert first.exists(), (tmp_path / "killed.log").read_text()
    assert not (tmp_path / "out/result.json").exists()
    again = run_llmkit("label", recipe)
    assert again.code == 0, again.stderr
    assert _rows(tmp_path / "out/labels") == _rows(tmp_path / "whole/labels")
    assert len(_rows(tmp_path / "out/labels")) == 48


def test_sft_trains_on_the_labels_and_labels_better_then(run_llmkit: RunLlmkit, recipe: Path, tmp_path: Path) -> None:
    """Half of the way of weak labels: what a labeller says becomes a student, who says the same."""
    made = run_llmkit("label", recipe, "--json")
    assert made.code == 0, made.stderr
    first = {(row["number"], row["label"]) for row in _rows(tmp_path / "out/labels")}
    train = tmp_path / "sft.yaml"
    train.write_text(
        yaml.safe_dump({
            "name": "student", "output_dir": "student",
            "model": {"name_or_path": yaml.safe_load(recipe.read_text())["models"]["name_or_path"]},
            "data": {"train": "out/labels", "max_length": 64},
            "train": {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "warmup_ratio": 0.0},
            "tracking": {"enabled": False},
        })
    )  # fmt: skip
    trained = run_llmkit("sft", train)
    assert trained.code == 0, trained.stderr
    report = json.loads((tmp_path / "student/data_report.json").read_text())
    assert "prompt_completion" in json.dumps(report)
    student = run_llmkit("label", recipe, "models=student", "scoring={}", "output_dir=second", "--json")
    assert student.code == 0, student.stderr
    second = {(row["number"], row["label"]) for row in _rows(tmp_path / "second/labels")}
    assert len(first & second) >= 0.8 * len(first)
    assert student.json()["metrics"]["confidence"] > 0.7
