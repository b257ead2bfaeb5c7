"""The whole way by the command line: train, stop, resume, merge, chat, with a tiny model and real parts."""

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

import pytest
import yaml

RunLlmkit = Callable[..., Any]

ROWS = [
    {"prompt": f"What is {a} + {b}?", "completion": f"{a} + {b} = {a + b}. The answer is {a + b}."}
    for a in range(8)
    for b in range(6)
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({
            "name": "sums",
            "output_dir": "out",
            "model": {"name_or_path": str(tiny_llama)},
            "data": {"train": "rows.jsonl", "eval": {"split": 0.2}, "max_length": 128, "packing": True},
            "train": {
                "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 2,
                "save_steps": 3, "eval_steps": 3, "sample_prompts": 1,
            },
            "tracking": {"enabled": False},
        })
    )  # fmt: skip
    return path


def test_sft_then_chat(run_llmkit: RunLlmkit, recipe: Path, tmp_path: Path) -> None:
    done = run_llmkit("sft", recipe, "tracking.enabled=true", "tracking.experiment=e2e")
    assert done.code == 0, done.stderr
    assert done.stdout == ""
    for part in ("step 6/6", "sft sums: done", "run folder:  out", "llmkit chat out", "mlflow server", "after:"):
        assert part in done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["run_id"]
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    assert (tmp_path / "mlflow.db").is_file()
    again = run_llmkit("sft", recipe, "tracking.enabled=true", "tracking.experiment=e2e", "--json")
    assert again.json()["finished_at"] == result["finished_at"]
    answer = run_llmkit("chat", "out", "--prompt", "What is 2 + 2?", "--max-new-tokens", "5")
    assert answer.code == 0, answer.stderr
    assert answer.stdout.strip()
    asked = run_llmkit("chat", "out/model", "--max-new-tokens", "3", stdin="What is 1 + 1?\nWhat is 2 + 1?\n")
    assert asked.code == 0, asked.stderr
    assert len(asked.stdout.splitlines()) >= 2
    assert run_llmkit("sync", "out").code == 0


def test_lora_then_merge_then_chat_with_json(run_llmkit: RunLlmkit, recipe: Path, tmp_path: Path) -> None:
    done = run_llmkit("lora", recipe, "adapter.r=4", "--json")
    assert done.code == 0, done.stderr
    result = done.json()
    assert (result["stage"], result["status"]) == ("lora", "done")
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    merged = run_llmkit("merge", "out", "--output", "merged", "--json")
    assert merged.code == 0, merged.stderr
    assert merged.json()
    assert (tmp_path / "merged" / "config.json").is_file()
    for model in ("out", "merged"):
        answer = run_llmkit("chat", model, "--prompt", "What is 2 + 2?", "--max-new-tokens", "5")
        assert answer.code == 0, answer.stderr


def test_sigterm_leaves_with_138_and_the_same_command_goes_on(
    run_llmkit: RunLlmkit, recipe: Path, tmp_path: Path
) -> None:
    command = ["sft", str(recipe), "train.max_steps=150", "train.logging_steps=1", "train.sample_prompts=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    limit = time.monotonic() + 200
    while "step 5/150" not in seen:
        line = process.stderr.readline()
        assert line, f"it ended too early: {seen}"
        assert time.monotonic() < limit, seen
        seen += line
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 138, seen + rest
    stopped = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (stopped["status"], stopped["exit_code"]) == ("stopped", 138)
    # Step 6 is evaluated too: the evaluation must not swallow the checkpoint.
    saved = [int(p.name.removeprefix("checkpoint-")) for p in (tmp_path / "out" / "checkpoints").glob("checkpoint-*")]
    assert max(saved) >= 5
    shown = run_llmkit(*command, "--dry-run")
    assert "the last complete checkpoint" in shown.stderr
    done = run_llmkit(*command)
    assert done.code == 0, done.stderr
    assert "Going on" in done.stderr
    assert "step 1/150" not in done.stderr
    assert "step 150/150" in done.stderr


def test_mistakes_in_data_and_model(run_llmkit: RunLlmkit, recipe: Path, tmp_path: Path) -> None:
    short = run_llmkit("sft", recipe, "data.max_length=16")
    assert short.code == 3, short.stderr
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "unfinished\n')
    bad = run_llmkit("sft", recipe)
    assert bad.code == 3, bad.stderr
    assert "rows.jsonl:49" in bad.stderr
    missing = run_llmkit("sft", recipe, "model.name_or_path=models/none", "data.on_bad_row=drop", "--json")
    assert missing.code == missing.json()["exit_code"] == 6, missing.stderr
    assert "models/none" in missing.json()["error"]
    for done in (short, bad, missing):
        assert "Traceback" not in done.stderr
    # A fixed recipe starts normally in the same folder.
    assert run_llmkit("sft", recipe, "data.on_bad_row=drop", "train.max_steps=2").code == 0


def test_cpt_on_plain_text(run_llmkit: RunLlmkit, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": r["completion"] * 5}) + "\n" for r in ROWS))
    answers = run_llmkit("cpt", recipe)  # prompts and completions: every token of a text is learned, not an answer
    assert answers.code == 3, answers.stderr
    assert "text" in answers.stderr
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": ROWS[0]["prompt"] * 5}) + "\n")
    done = run_llmkit("cpt", recipe, "data.train=text.jsonl", "data.eval=held.jsonl", "train.max_steps=3")
    assert done.code == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {(e["name"], e["context"]) for e in events if e["event"] == "dataset"} == {
        ("text.jsonl", "train"), ("held.jsonl", "eval"),
    }  # fmt: skip
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_the_same_result_from_python(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmkit

    monkeypatch.chdir(tmp_path)
    result = llmkit.sft(recipe, {"train.max_steps": 2}, output_dir="from-python")
    assert result.status == "done"
    assert result.output_dir == tmp_path / "from-python"
    assert (tmp_path / "from-python" / "model" / "config.json").is_file()
