"""QLoRA through whole runs: what was asked of a quantized model before training changes nothing, and its adapter holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import SUMS, assert_identical, history, recipe, run, weights

from llmkit.data.store import TokenStore

KINDS = ["nf4", "int8"]


def _held_out(folder: Path) -> dict[str, Any]:
    path = folder / "held-out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUMS[:5]))
    return {"eval": str(path)}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_and_answering_before_the_first_step_changes_no_bit(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """On a CPU with AVX512-bf16, bitsandbytes' own layers would learn from garbage after it."""
    quantized = {"model__quantization": kind, "model__dtype": "bfloat16", "adapter__r": 4}
    run(recipe(tmp_path, tiny_llama), "silent", "lora", **quantized)
    asked = recipe(tmp_path, tiny_llama, data=_held_out(tmp_path), eval_steps=3, sample_prompts=2)
    result = run(asked, "asked", "lora", **quantized)
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"] - 0.5
    assert len(result.samples) == 2
    assert history(tmp_path / "asked") == history(tmp_path / "silent")
    assert_identical(weights(tmp_path / "asked"), weights(tmp_path / "silent"))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_is_that_of_a_fresh_load_by_transformers(
    kind: str, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    monkeypatch.chdir(tmp_path)
    what = recipe(tmp_path, tiny_qwen, data=_held_out(tmp_path), max_steps=1, num_train_epochs=1)
    found = run(what, "run", "lora", model__quantization=kind, model__dtype="bfloat16").metrics["eval_loss_before"]
    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.bfloat16, quantization_config=config)
    (path,) = (tmp_path / "cache").rglob("eval*.arrow")
    store = TokenStore(path)
    total, tokens = 0.0, 0
    for index in range(len(store)):
        ids, labels = (torch.from_numpy(part.astype("int64"))[None] for part in store.row(index))
        count = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model.train()(ids, labels=labels).loss) * count
        tokens += count
    assert found == pytest.approx(total / tokens, rel=2e-3)


@pytest.mark.usefixtures("fast")
def test_the_lean_layers_learn_what_pefts_own_learn(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    base = recipe(tmp_path, tiny_qwen, max_steps=8)
    curves = []
    for name in ("lean", "peft"):
        if name == "peft":
            monkeypatch.setattr("llmkit.training.run.lean_adapters", nullcontext)
        run(base, name, "lora", model__quantization="nf4", model__dtype="bfloat16", adapter__r=4)
        curves.append(history(tmp_path / name))
    assert curves[0][8] < curves[0][1] - 0.2
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    "changed",
    [
        {"train__gradient_checkpointing": True},
        {"adapter__use_dora": True},
        {"adapter__bias": "all"},
        {"model__dtype": "float32", "train__bf16": True},
        {"adapter__modules_to_save": ["lm_head"]},
        {"data__packing": True, "train__max_steps": 12},
    ],
    ids=str,
)
def test_every_way_to_train_learns(changed: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    ways = {"model__quantization": "nf4", "model__dtype": "bfloat16", "adapter__r": 4} | changed
    run(recipe(tmp_path, tiny_llama), "run", "lora", **ways)
    curve = history(tmp_path / "run")
    assert curve[max(curve)] < curve[1] - 0.3


def test_a_sequence_to_sequence_model_learns(tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(recipe(tmp_path, tiny_t5), "run", "lora", model__quantization="int8", adapter__r=8)
    curve = history(tmp_path / "run")
    assert curve[max(curve)] < curve[1] - 0.2


@pytest.mark.timeout(1200)
def test_train_merge_and_chat_by_the_command_line(
    run_llmkit: Callable[..., Any], demo_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({
            "name": "sums",
            "output_dir": "out",
            "model": {"name_or_path": str(demo_model), "dtype": "bfloat16", "quantization": "nf4"},
            "data": {"train": "rows.jsonl", "eval": {"split": 0.2}, "max_length": 128},
            "train": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-4, "logging_steps": 1, "sample_prompts": 0},
            "tracking": {"enabled": False},
        })
    )  # fmt: skip
    done = run_llmkit("lora", path, timeout=800)
    assert done.code == 0, done.stderr
    assert "106,168,320 of " in done.stderr and " weights are kept in nf4" in done.stderr
    assert "MatMul" not in done.stderr and "Warning" not in done.stderr
    metrics = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    assert metrics["eval_loss_before"] < 6, "garbage has a loss of 18 and more"
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    info = json.loads((tmp_path / "out" / "adapter" / "llmkit_base.json").read_text())
    assert info["quantization"] == {"type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    assert info["dtype"] == "bfloat16"
    answer = run_llmkit("chat", "out", "--prompt", "What is 2 + 2?", "--max-new-tokens", "8", timeout=800)
    assert answer.code == 0 and answer.stdout.strip(), answer.stderr
    merged = run_llmkit("merge", "out", timeout=800)
    assert merged.code == 0, merged.stderr
    assert "quantization: nf4 in training; merged into the unquantized base" in merged.stdout
    assert (tmp_path / "out" / "merged" / "config.json").is_file()
    assert "quantization_config" not in (tmp_path / "out" / "merged" / "config.json").read_text()
