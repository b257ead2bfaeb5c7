"""What only a GPU shows: the kernels that are taken there train alike, and what they need of its memory is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import history, recipe, run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.cuda.reset_peak_memory_stats()


def test_attention_by_rows_trains_like_rows_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    """bfloat16: rows end to end with variable-length attention, PyTorch's kernel, and one row at a time."""
    base = recipe(tmp_path, tiny_llama, learning_rate=1e-3)
    curves = []
    for name, changed in {
        "by rows": {},
        "sdpa": {"model__attn_implementation": "sdpa"},
        "alone": {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 4},
    }.items():
        result = run(base, name, model__dtype="bfloat16", **changed)
        assert result.metrics["peak_memory_device_bytes"] > 0
        curves.append(history(tmp_path / name))
    assert curves[0][12] < curves[0][1]
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)
    assert curves[0] == pytest.approx(curves[2], rel=2e-2)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_adapters_learn_are_reopened_and_answer(
    quantization: str | None, tiny_llama: Path, tmp_path: Path, record_property: Any
) -> None:
    """The export opens the adapter in a fresh process and compares its logits (verify)."""
    from llmkit.inference.generate import load_for_inference

    base = recipe(tmp_path, tiny_llama, data={"eval": {"split": 0.3}}, sample_prompts=1)
    result = run(base, "run", "lora", model__dtype="bfloat16", model__quantization=quantization, adapter__r=4)
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"]
    record_property("peak_memory_device_bytes", result.metrics["peak_memory_device_bytes"])
    model, _ = load_for_inference(tmp_path / "run")
    assert next(model.parameters()).device.type == "cuda"


def test_four_bits_take_less_memory_than_sixteen(demo_model: Path) -> None:
    from llmkit.modeling.load import open_model
    from llmkit.modeling.settings import QuantizationSettings

    taken = []
    for quantization in (None, QuantizationSettings(type="nf4")):
        before = torch.cuda.memory_allocated()
        model = open_model(demo_model, dtype="bfloat16", quantization=quantization)
        if quantization is None:
            model.to("cuda")  # type: ignore[arg-type]
        taken.append(torch.cuda.memory_allocated() - before)
        del model
    assert taken[1] < 0.5 * taken[0]
