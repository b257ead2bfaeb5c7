"""A recipe of every kind to test with, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import RecipeError
from llmkit.recipe import Recipe, load_recipe, parse
from llmkit.stages import lora

SMALL: dict[str, Any] = {"name": "n", "model": {"name_or_path": "m"}, "data": {"train": "t.jsonl"}}

FROM_THE_ISSUE = """\
name: gsm8k-sft
seed: 0
output_dir: runs/gsm8k-sft
model:
  name_or_path: models/smollm2-135m-instruct
  dtype: bfloat16            # auto | float32 | bfloat16 | float16
data:
  train: ../shared/data/gsm8k/train.jsonl     # path, glob, list of sources with weights, s3:// URI, or hub id
  eval: {split: 0.02}                          # or a source
  format: prompt_completion                    # messages | sharegpt | alpaca | prompt_completion | text
  columns: {prompt: question, completion: answer}
  max_length: 512
  on_too_long: drop                            # error (the default: here it names 7 rows, exit code 3) | drop | truncate
  packing: true
train:                                         # Hugging Face's names and meanings
  num_train_epochs: 1
  max_steps: -1
  learning_rate: 2e-5
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
  lr_scheduler_type: cosine
  warmup_ratio: 0.03
  logging_steps: 10
  eval_steps: 50
  save_steps: 50
  save_total_limit: 2
adapter: {r: 16, lora_alpha: 32, lora_dropout: 0.05, target_modules: all-linear}   # PEFT's names
tracking: {experiment: gsm8k}                  # uri defaults to MLFLOW_TRACKING_URI, else sqlite in the working directory
"""


def mistakes(path: str | Path, kind: type[Recipe] = lora.Recipe, overrides: Any = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, kind, overrides)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def of_data(data: dict[str, Any], kind: type[Recipe] = lora.Recipe, overrides: Any = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(data, kind, overrides)
    return [str(problem) for problem in caught.value.problems]


def small(**blocks: dict[str, Any]) -> dict[str, Any]:
    """The smallest recipe, with keys added to its blocks."""
    return SMALL | {key: SMALL.get(key, {}) | block for key, block in blocks.items()}
