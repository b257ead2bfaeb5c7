"""``per_device_train_batch_size: auto``: the step stays the same, whatever fits; memory is limited for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_runs import assert_close, assert_identical, recipe, run, weights

from llmkit.errors import WontFitError
from llmkit.recipe import parse
from llmkit.runner import prepare
from llmkit.stages import sft
from llmkit.training.fit import FILE, Chosen

TOY = Path(__file__).resolve().parents[1] / "toys" / "limited_run.py"
LONG = "what is the capital of France and how many legs has a spider? " * 20


def long_recipe(folder: Path, model: Path, **train: Any) -> dict[str, Any]:
    """Sixteen rows of about 800 tokens, two steps of eight."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} {LONG}", "completion": LONG}) + "\n" for i in range(16)))
    given = {"num_train_epochs": 1, "micro_batch_tokens": 0, "per_device_train_batch_size": "auto", "save_steps": 1}
    made = recipe(folder, model, data={"max_length": 4096}, **(given | train))
    return made | {"plan": "off"}


def limited(folder: Path, given: dict[str, Any], when: str, megabytes: int) -> subprocess.CompletedProcess[str]:
    path = folder / "recipe.json"
    path.write_text(json.dumps(given))
    return subprocess.run(
        [sys.executable, str(TOY), str(path), when, str(megabytes)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=280, env=os.environ | {"LLMKIT_CACHE": str(folder)},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))


def test_auto_trains_what_8_trains(tmp_path: Path, tiny_llama: Path) -> None:
    """The same weights bit for bit where all eight fit; the number is in the folder, and what was needed in the history."""
    what = recipe(tmp_path, tiny_llama, per_device_train_batch_size="auto")
    auto = run(what, "auto")
    eight = run(what, "eight", train__per_device_train_batch_size=8)
    assert_identical(weights(tmp_path / "auto"), weights(tmp_path / "eight"))
    assert Chosen.read(tmp_path / "auto") == Chosen(8, 1, 8)
    assert not (tmp_path / "eight" / FILE).exists()
    for result in (auto, eight):
        assert result.metrics["predicted_memory_host_bytes"] > 0
        assert result.metrics["peak_memory_host_bytes"] > 0
    assert len((tmp_path / "cache" / "memory.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_keeps_its_number(tmp_path: Path, tiny_llama: Path) -> None:
    what = recipe(tmp_path, tiny_llama, per_device_train_batch_size="auto", gradient_accumulation_steps=1)
    out = tmp_path / "kept"
    prepare(parse(what | {"output_dir": str(out)}, sft.Recipe), "sft")
    Chosen(2, 4, 2).write(out)
    run(what, "kept")
    run(what, "eight", train__per_device_train_batch_size=8)
    assert Chosen.read(out) == Chosen(2, 4, 2)
    assert_close(weights(out), weights(tmp_path / "eight"), 1e-4)


def test_a_process_without_room_for_one_sequence_says_so_before_the_first_step(
    tmp_path: Path, tiny_llama: Path
) -> None:
    done = limited(tmp_path, long_recipe(tmp_path, tiny_llama), "BEFORE", 10)
    assert done.returncode != 0
    assert "WontFitError: Not even one sequence fits into memory" in done.stderr
    assert Chosen.read(tmp_path / "out") is None
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_memory_that_runs_out_in_a_step_makes_it_smaller(tmp_path: Path, tiny_llama: Path) -> None:
    """The step is done again in smaller parts and is the same step: the weights are those of a run without a limit."""
    done = limited(tmp_path, long_recipe(tmp_path, tiny_llama), "DURING", 50)
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = Chosen.read(tmp_path / "out")
    assert chosen is not None
    assert (chosen.batch, chosen.at_once < 8) == (8, True)
    assert "out of memory in step 1 with 8 sequences at once" in done.stderr
    free = long_recipe(tmp_path, tiny_llama, per_device_train_batch_size=8)
    run(free, "free")
    assert_close(weights(tmp_path / "out"), weights(tmp_path / "free"), 1e-4)


def test_a_plan_that_does_not_fit_ends_with_5(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.modeling.devices import GIB, Device

    small = Device("cpu", 0.2 * GIB, 0.2 * GIB, cpu=True, count=1, where="test")
    monkeypatch.setattr("llmkit.training.plan_report.device", lambda: small)
    with pytest.raises(WontFitError, match="This run will not fit") as caught:
        run(recipe(tmp_path, tiny_llama) | {"plan": "error"}, "refused")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "refused" / "checkpoints").exists()
