"""What a wrong recipe is told [25]: every mistake at once, with its place and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from recipe_texts import SMALL, mistakes, of_data, small

from llmkit.data.settings import DataSettings
from llmkit.errors import RecipeError
from llmkit.recipe import load_recipe, parse
from llmkit.stages import cpt, lora, sft
from llmkit.training.settings import TrainSettings

WRONG = """\
nme: x
learning_rate: 1e-4
model:
  base_model: foo
  dtype: bf16
data:
  train: {paht: a.jsonl, weight: "2"}
  eval: {split: 2}
  max_length: yes
  columns: {promt: q}
train:
  max_steps: "8"
  bf16: true
  fp16: true
  lora_r: 8
  num_train_epochs: .nan
  save_steps: true
  warmup_ratio:
  logging_steps: 1e1
  packing: true
  zzz: 1
  train.optim: sgd
adapter: {r: 16, r: 8, target_modules: 5, init_lora_weights: pisa}
tracking: {uri: "http://me:pw@host/", alias: x, tags: {v: 1.0}, enabled: no}
"""

EXPECTED = """\
r.yaml:23:18: adapter.r: given twice, first at r.yaml:23:11
    keep one of them
r.yaml:1:1: nme: unknown key
    did you mean `name`?
r.yaml:2:1: learning_rate: unknown key
    belongs under `train:`
r.yaml:4:3: model.base_model: unknown key
    here it is called `name_or_path`
r.yaml:5:10: model.dtype: expected one of auto, float32, bfloat16, float16, got 'bf16' (text)
    did you mean `bfloat16`?
r.yaml:7:11: data.train.paht: unknown key
    did you mean `path`?
r.yaml:7:34: data.train.weight: expected a number of more than 0, got '2' (text)
    write 2, without quotes
r.yaml:8:17: data.eval.split: expected a number of more than 0 and less than 1, got 2
r.yaml:9:15: data.max_length: expected a whole number of at least 8, got 'yes' (text)
r.yaml:10:20: data.columns.promt: is not a field of a format; its fields are messages, tools, conversations, from, value, \
system, instruction, input, output, history, prompt, completion, text
    columns are written `{field of the format: your column}`
r.yaml:12:14: train.max_steps: expected a whole number of at least -1, got '8' (text)
    write 8, without quotes
r.yaml:14:9: train.fp16: excludes `bf16`
    keep one of them
r.yaml:15:3: train.lora_r: unknown key
    here it is `r`, under `adapter:`
r.yaml:16:21: train.num_train_epochs: expected a number of more than 0, got nan
r.yaml:17:15: train.save_steps: expected a whole number of at least 1, got true
r.yaml:18:16: train.warmup_ratio: expected a number of at least 0 and less than 1, got nothing
    remove the line to take the default
r.yaml:19:18: train.logging_steps: expected a whole number of at least 1, got 10.0
    write 10
r.yaml:20:3: train.packing: unknown key
    belongs under `data:`
"""


def test_every_mistake_is_told_at_once_with_its_place(write_recipe: Callable[[str], str]) -> None:
    found = mistakes(write_recipe(WRONG))
    text = "\n".join(found) + "\n"
    assert text.startswith(EXPECTED), text
    rest = found[len([line for line in EXPECTED.splitlines() if not line.startswith("    ")]) :]
    assert rest[0].startswith("r.yaml:21:3: train.zzz: unknown key; the keys here are num_train_epochs, max_steps, ")
    assert rest[1:] == [
        "r.yaml:22:3: train.train.optim: unknown key\n"
        "    write `optim:` indented under `train:`, or train.optim=VALUE on the command line",
        'r.yaml:23:40: adapter.target_modules: expected text or a list of text, got 5\n    write it in quotes: "5"',
        "r.yaml:23:62: adapter.init_lora_weights: expected true or false or one of gaussian, pissa, olora, "
        "got 'pisa' (text)\n    did you mean `pissa`?",
        "r.yaml:24:17: tracking.uri: holds a password in a URI\n    a recipe holds no secrets: set it in the environment "
        "(HF_TOKEN, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD)",
        "r.yaml:24:46: tracking.alias: needs `register`, the name of the registered model",
        'r.yaml:24:59: tracking.tags.v: expected text, got 1.0\n    write it in quotes: "1.0"',
        "r.yaml:24:74: tracking.enabled: expected true or false, got 'no' (text)\n    write false",
    ]


def test_the_error_counts_its_problems(write_recipe: Callable[[str], str]) -> None:
    with pytest.raises(RecipeError, match=r"^2 mistakes in the recipe:\n  r\.yaml:1:1: nam: unknown key") as caught:
        load_recipe(write_recipe("nam: a\nmodel: {name_or_path: m}\n"), sft.Recipe)
    assert str(caught.value).count("\n") == 3
    assert "r.yaml:1:1: data: is missing. What it is trained on." in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"data": {"train": 5}}, "recipe: data.train: expected text, a mapping (path, weight, split, format, columns, license), or a list of these, got 5\n    write it in quotes: \"5\""),
        ({"data": {"train": [5]}}, "recipe: data.train.0: expected text or a mapping (path, weight, split, format, columns, license), got 5\n    write it in quotes: \"5\""),
        ({"data": {"train": {"weight": 2}}}, "recipe: data.train.path: is missing. A local path, a glob, an fsspec URI (``s3://…``) or a hub data set id."),
        ({"data": {"train": {"path": "a", "wieght": 2}}}, "recipe: data.train.wieght: unknown key\n    did you mean `weight`?"),
        ({"data": {"train": ["a", {"path": "b", "weight": -1}]}}, "recipe: data.train.1.weight: expected a number of more than 0, got -1"),
        ({"data": {"train": ""}}, "recipe: data.train: must not be empty"),
        ({"data": {"eval": {"splt": 0.1}}}, "recipe: data.eval.splt: unknown key\n    did you mean `split`?"),
        ({"data": {"eval": {"split": "0.1"}}}, "recipe: data.eval.split: expected a number of more than 0 and less than 1, got '0.1' (text)\n    write 0.1, without quotes"),
        ({"data": {"format": "chatml"}}, "recipe: data.format: expected one of auto, messages, sharegpt, alpaca, prompt_completion, text, got 'chatml' (text)\n    did you mean `messages`?"),
        ({"data": {"columns": {"prompt": 3}}}, 'recipe: data.columns.prompt: expected text, got 3\n    write it in quotes: "3"'),
        ({"data": {"columns": ["prompt"]}}, "recipe: data.columns: expected a mapping of names to text, got a list"),
        ({"data": {"format": "text", "columns": {"prompt": "a"}}}, "recipe: data.columns.prompt: is not a field of the format text; its fields are text\n    columns are written `{field of the format: your column}`"),
        ({"model": {"tokenizer": {"vocab_size": 1}, "init": "from_config"}}, "recipe: model.tokenizer.vocab_size: expected a whole number of at least 300, got 1"),
        ({"adapter": {"modules_to_save": "lm_head"}}, "recipe: adapter.modules_to_save: expected a list of text, got 'lm_head' (text)\n    write a list: [lm_head]"),
        ({"adapter": {"use_dora": 1}}, "recipe: adapter.use_dora: expected true or false, got 1\n    write true"),
        ({"adapter": {"rank": 8}}, "recipe: adapter.rank: unknown key\n    here it is called `r`"),
        ({"train": {"micro_batch_tokens": -1}}, "recipe: train.micro_batch_tokens: expected a whole number of at least 0 or auto, got -1"),
        ({"train": {"eval_steps": "1,000"}, "data": {"eval": "e"}}, "recipe: train.eval_steps: expected a whole number of at least 1 or null, got '1,000' (text)\n    write 1000"),
        ({"train": {"learning_rate": math.inf}}, "recipe: train.learning_rate: expected a number of more than 0, got inf"),
        ({"train": {"lr_scheduler_kwargs": {"a": [math.nan]}}}, "recipe: train.lr_scheduler_kwargs.a.0: expected a finite number, got nan"),
        ({"train": {"gradient_checkpoint": True}}, "recipe: train.gradient_checkpoint: unknown key\n    did you mean `gradient_checkpointing`?"),
        ({"train": {"max-steps": 1}}, "recipe: train.max-steps: unknown key\n    did you mean `max_steps`?"),
        ({"train": {"seed": 1}}, "recipe: train.seed: unknown key\n    belongs at the top level, not in a block"),
        ({"tracking": {"wandb_project": "x"}}, "recipe: tracking.wandb_project: unknown key\n    runs are recorded in MLflow: `tracking.experiment`"),
    ],
)  # fmt: skip
def test_one_readable_message_for_what_was_meant(blocks: dict[str, Any], message: str) -> None:
    assert of_data(small(**blocks)) == [message]


@pytest.mark.parametrize(
    ("blocks", "kind", "key", "part"),
    [
        ({"data": {"streaming": True}}, sft, "train.max_steps", "is needed with `data.streaming`"),
        ({"data": {"streaming": True, "eval": {"split": 0.1}}, "train": {"max_steps": 5}}, sft, "data.eval", "a share of a stream"),
        ({"train": {"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 5}}, sft, "train.eval_steps", "needs held-out rows"),
        ({"data": {"eval": "e"}, "train": {"early_stopping_patience": 2}}, sft, "train.early_stopping_patience", "needs `eval_steps`"),
        ({"data": {"eval": "e"}, "train": {"load_best_model_at_end": True, "eval_steps": 30, "save_steps": 40}}, sft, "train.load_best_model_at_end", "multiple"),
        ({"train": {"early_stopping_threshold": 0.1}}, sft, "train.early_stopping_threshold", "does nothing alone"),
        ({"train": {"bf16": True, "fp16": True}}, sft, "train.fp16", "excludes `bf16`"),
        ({"train": {"bf16": True}, "model": {"dtype": "bfloat16"}}, sft, "train.bf16", "keeps float32 weights"),
        ({"train": {"fp16": True}, "model": {"dtype": "float16"}}, sft, "train.fp16", "keeps float32 weights"),
        ({"train": {"max_steps": 0}}, sft, "train.max_steps", "no steps"),
        ({"model": {"config_overrides": {"a": 1}}}, sft, "model.config_overrides", "needs `init: from_config`"),
        ({"model": {"tokenizer": {}}}, cpt, "model.tokenizer", "training a tokenizer needs"),
        ({"data": {"format": "messages"}}, cpt, "data.format", "continued pre-training reads text"),
        ({"data": {"train": ["a", {"path": "b", "format": "alpaca"}]}}, cpt, "data.train.1.format", "reads text"),
        ({"adapter": {"target_modules": []}}, lora, "adapter.target_modules", "names no layer"),
        ({"data": {"train": []}}, sft, "data.train", "names no source"),
        ({"tracking": {"alias": "a"}}, sft, "tracking.alias", "needs `register`"),
        ({"model": {"name_or_path": "${HOME}/m"}}, sft, "model.name_or_path", "${HOME} is not expanded"),
        ({"data": {"train": "$DATA/x.jsonl"}}, sft, "data.train", "$DATA is not expanded"),
        ({"data": {"cache_dir": "~/c"}}, sft, "data.cache_dir", "`~` is not expanded"),
        ({"tracking": {"experiment": "a\ud800"}}, sft, "tracking.experiment", "no file can hold"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_together(blocks: dict[str, Any], kind: Any, key: str, part: str) -> None:
    found = of_data(small(**blocks), kind.Recipe)
    assert any(line.startswith(f"recipe: {key}: ") and part in line for line in found), found


def test_a_conflict_is_not_told_where_its_setting_is_wrong_already() -> None:
    found = of_data(small(data={"streaming": True}, train={"max_steps": "5"}))
    assert len(found) == 1
    assert "without quotes" in found[0]


def test_a_conflict_is_told_beside_missing_keys(write_recipe: Callable[[str], str]) -> None:
    found = mistakes(write_recipe("data: {train: a}\ntrain: {bf16: true, fp16: true}\n"))
    assert [line.split(":")[3].strip() for line in found] == ["name", "model", "train.fp16"]


def test_conflicts_stop_settings_made_in_python_too() -> None:
    with pytest.raises(ValidationError, match="fp16: excludes `bf16`"):
        TrainSettings(bf16=True, fp16=True)
    with pytest.raises(ValidationError, match="names no source"):
        DataSettings(train=[])
    with pytest.raises(ValidationError, match="int_type"):
        TrainSettings(max_steps="8")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\\b", "..", ".hidden", "-x", " a", "a\n", "x" * 121, "a:b"])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str) -> None:
    assert of_data(SMALL | {"name": name})[0].startswith("recipe: name: ")


def test_free_text_may_hold_dollars() -> None:
    text = "Answer with ${price} in $USD"
    assert parse(small(data={"system": text}), sft.Recipe).data.system == text
