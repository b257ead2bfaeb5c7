"""Recipes: what is read, what is refused [25], and in which words; secrets [34]."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmkit.data.formats import FORMATS
from llmkit.data.settings import COLUMN_FIELDS, DataSettings, EvalSplitSettings, SourceSettings
from llmkit.errors import RecipeError
from llmkit.foreign_keys import FOREIGN_KEYS, FOREIGN_VALUES
from llmkit.modeling.settings import AdapterSettings, ModelSettings
from llmkit.recipe import Recipe, TrackingSettings, diff, dump, load_recipe, parse
from llmkit.recipe_hints import keys_of
from llmkit.stages import cpt, lora, sft
from llmkit.training.settings import TrainSettings

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


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], str]:
    """Writes ``r.yaml`` into the working directory, so that messages begin with ``r.yaml:``."""
    monkeypatch.chdir(tmp_path)

    def to(text: str | bytes) -> str:
        Path("r.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return "r.yaml"

    return to


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


# --- what is read ---------------------------------------------------------------------------------------------------


def test_the_recipe_of_the_issue_runs_as_lora_and_without_its_adapter_as_sft(write: Callable[[str], str]) -> None:
    recipe = load_recipe(write(FROM_THE_ISSUE), lora.Recipe)
    assert recipe.train.learning_rate == 2e-5
    assert recipe.data.eval == EvalSplitSettings(split=0.02)
    assert recipe.adapter == AdapterSettings(r=16, lora_alpha=32, lora_dropout=0.05)
    without = "".join(line for line in FROM_THE_ISSUE.splitlines(keepends=True) if not line.startswith("adapter"))
    assert load_recipe(write(without), sft.Recipe).output_dir == "runs/gsm8k-sft"
    assert mistakes(write(FROM_THE_ISSUE), sft.Recipe) == [
        "r.yaml:27:1: adapter: unknown key\n    full fine-tuning has no adapter: use `llmkit lora`, or remove the line"
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-5", 1e-5), ("2E5", 2e5), ("1.5e+3", 1500.0), (".5", 0.5), ("1.", 1.0), ("012", 12), ("0o14", 12), ("0x0c", 12),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("true", True), ("False", False),
        ("2026-11-21", "2026-11-21"), ("12:30:45", "12:30:45"), ("1_000", "1_000"), ("~", None), ("", None),
        ("null", None), ('"1e-5"', "1e-5"), ("'no'", "no"), ("!!str 1", "1"), ("!!float 1", 1.0), ("<<", "<<"),
        ("[1, a, {b: 2.0}]", [1, "a", {"b": 2.0}]), ("한국어", "한국어"), ("0.0.1", "0.0.1"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(written: str, read: object) -> None:
    overrides = [f"model.config_overrides.x={written}", "model.init=from_config"]
    found = parse(SMALL, lora.Recipe, overrides).model.config_overrides["x"]
    assert found == read
    assert type(found) is type(read)


def test_anchors_and_merge_keys_work_and_own_keys_win(write: Callable[[str], str]) -> None:
    text = """
name: a
model: {name_or_path: m}
data:
  train:
    - &one {path: a.jsonl, weight: 2, split: x}
    - {<<: *one, path: b.jsonl}
    - {<<: [{weight: 3}, *one], path: c.jsonl}
"""
    sources = load_recipe(write(text), sft.Recipe).data.train
    assert sources == [
        SourceSettings(path="a.jsonl", weight=2, split="x"),
        SourceSettings(path="b.jsonl", weight=2, split="x"),
        SourceSettings(path="c.jsonl", weight=3, split="x"),
    ]


def test_output_dir_is_made_of_the_name() -> None:
    assert parse(SMALL, sft.Recipe).output_dir == "runs/n"
    assert parse(SMALL | {"name": "쇼핑 의도"}, sft.Recipe).output_dir == "runs/쇼핑 의도"


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(write: Callable[[bytes], str]) -> None:
    text = b"\xef\xbb\xbf" + FROM_THE_ISSUE.replace("\n", "\r\n").encode()
    assert load_recipe(write(text), lora.Recipe).name == "gsm8k-sft"


def test_registering_a_model_implies_storing_it() -> None:
    assert parse(small(tracking={"register": "m"}), sft.Recipe).tracking.log_model
    assert TrackingSettings(register="m").log_model
    assert "log_model" in of_data(small(tracking={"register": "m", "log_model": False}))[0]


def test_values_from_python_are_read_like_yaml(tmp_path: Path) -> None:
    data = small(data={"train": [Path("a.jsonl"), {"path": Path("b.jsonl")}]}, model={"name_or_path": tmp_path})
    recipe = parse(
        data | {"train": TrainSettings(max_steps=3)}, sft.Recipe, {"train.learning_rate": 1, "data.train.1.weight": 2}
    )
    assert recipe.model.name_or_path == str(tmp_path)
    assert recipe.data.train == ["a.jsonl", SourceSettings(path="b.jsonl", weight=2)]
    assert (recipe.train.max_steps, recipe.train.learning_rate) == (3, 1.0)
    assert data["train" if "train" in data else "data"]["train"][1] == {"path": Path("b.jsonl")}, (
        "the caller's own is kept"
    )


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_set_make_and_clear(write: Callable[[str], str]) -> None:
    overrides = [
        "train.learning_rate=1e-5", "data.packing=true", "data.eval.split=0.1", "data.train.1.weight=2",
        "adapter={r: 4, target_modules: [q_proj]}", "tracking.run_name=a=b", "train.eval_steps=", "data.system=''",
    ]  # fmt: skip
    text = """
name: a
model: {name_or_path: m}
data: {train: [a.jsonl, {path: b.jsonl}], eval: null}
train: {eval_steps: 5}
"""
    recipe = load_recipe(write(text), lora.Recipe, overrides)
    assert recipe.train.learning_rate == 1e-5
    assert recipe.data.packing is True
    assert recipe.data.eval == EvalSplitSettings(split=0.1)
    assert recipe.data.train == ["a.jsonl", SourceSettings(path="b.jsonl", weight=2)]
    assert recipe.adapter == AdapterSettings(r=4, target_modules=["q_proj"])
    assert recipe.tracking.run_name == "a=b"
    assert recipe.train.eval_steps is None
    assert recipe.data.system == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x", "command line: 'x' is not KEY=VALUE\n    for example train.learning_rate=1e-5"),
        ("=1", "command line: is not a dotted key\n    for example train.max_steps=20"),
        ("train..x=1", "command line: train..x: is not a dotted key\n    for example train.max_steps=20"),
        ("name.x=1", "command line: name.x: `name` is not a block, so nothing can be set in it"),
        ("data.train.x=1", "command line: data.train.x: `data.train` is not a block, so nothing can be set in it"),
        (
            "data.eval.2.path=x",
            "command line: data.eval.2.path: `data.eval` is a list, and its entries are 0 to 0\n"
            "    give the whole list: data.eval=[...]",
        ),
        (
            "data.train=*.jsonl",
            "command line: data.train: its value is not YAML: `*` and `&` mean anchors in YAML\n"
            "    quote the value twice: data.train='\"...\"'",
        ),
        (
            "data.system=a #b",
            "command line: data.system: ` #` begins a comment in YAML\n    quote the value twice: data.system='\"...\"'",
        ),
        ("train.max_stps=1", "command line: train.max_stps: unknown key\n    did you mean `max_steps`?"),
        (
            "train.max_steps=ten",
            "command line: train.max_steps: expected a whole number of at least -1, got 'ten' (text)",
        ),
        ("a={b: 1, b: 2}", "command line: a: given twice, first at character 2\n    keep one of them"),
    ],
)
def test_wrong_overrides_say_so(override: str, message: str) -> None:
    assert message in of_data(small(data={"eval": ["e.jsonl"]}), overrides=[override])


def test_an_override_replaces_what_was_wrong_in_the_file(write: Callable[[str], str]) -> None:
    path = write("name: a\nmodel: {name_or_path: m}\ndata: {train: 3}\n")
    assert load_recipe(path, sft.Recipe, ["data.train=x.jsonl"]).data.train == "x.jsonl"
    assert mistakes(path, overrides=["data.train=[]"]) == ["command line: data.train: names no source"]


# --- golden messages ------------------------------------------------------------------------------------------------

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


def test_every_mistake_is_told_at_once_with_its_place(write: Callable[[str], str]) -> None:
    found = mistakes(write(WRONG))
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


def test_the_error_counts_its_problems(write: Callable[[str], str]) -> None:
    with pytest.raises(RecipeError, match=r"^2 mistakes in the recipe:\n  r\.yaml:1:1: nam: unknown key") as caught:
        load_recipe(write("nam: a\nmodel: {name_or_path: m}\n"), sft.Recipe)
    assert str(caught.value).count("\n") == 3
    assert "r.yaml:1:1: data: is missing. What it is trained on." in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"data": {"train": 5}}, "recipe: data.train: expected text, a mapping (path, weight, split, format, columns), or a list of these, got 5\n    write it in quotes: \"5\""),
        ({"data": {"train": [5]}}, "recipe: data.train.0: expected text or a mapping (path, weight, split, format, columns), got 5\n    write it in quotes: \"5\""),
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


def test_a_conflict_is_told_beside_missing_keys(write: Callable[[str], str]) -> None:
    found = mistakes(write("data: {train: a}\ntrain: {bf16: true, fp16: true}\n"))
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


# --- keys of other tools --------------------------------------------------------------------------------------------


def test_foreign_keys_lead_to_keys_that_exist() -> None:
    known = {f"{block}.{key}" if block else key for block, key in keys_of(lora.Recipe)}
    targets = {target for target in FOREIGN_KEYS.values() if " " not in target}
    assert targets <= known
    assert len(FOREIGN_KEYS) >= 60
    named = [word for text in FOREIGN_KEYS.values() if " " in text for word in text.split("`")[1::2]]
    settings_named = {word.split(":")[0] for word in named if "." in word.split(" ")[0] and not word.startswith("--")}
    assert settings_named <= known
    assert not set(FOREIGN_KEYS) & {key for block, key in keys_of(lora.Recipe) if not block}


def test_foreign_keys_named_in_the_issue_are_there() -> None:
    for key in ("base_model", "micro_batch_size", "sequence_len", "cutoff_len", "lora_target", "num_epochs"):
        found = of_data(SMALL | {key: 1})
        assert f"`{FOREIGN_KEYS[key].split('.')[-1]}`, under" in found[0]


def test_every_foreign_key_gets_its_advice_at_the_top_level() -> None:
    own = {key for _, key in keys_of(lora.Recipe)}
    keys = list(FOREIGN_KEYS)
    parts = [keys[at : at + 50] for at in range(0, len(keys), 50)]
    found = [line for part in parts for line in of_data(SMALL | dict.fromkeys(part, 1))]
    assert len(found) == len(FOREIGN_KEYS)
    for line, key in zip(found, FOREIGN_KEYS, strict=True):
        target = FOREIGN_KEYS[key]
        assert (target in line) or (f"`{target.split('.')[-1]}`" in line) or (key in own and "belongs under" in line), (
            line
        )


def test_foreign_values_lead_to_values_that_exist() -> None:
    text = str(lora.Recipe.model_json_schema())
    assert [value for value in FOREIGN_VALUES.values() if f"'{value}'" not in text] == []


def test_a_key_of_the_adapter_in_an_sft_recipe_names_the_stage() -> None:
    assert of_data(SMALL | {"lora_r": 8}, sft.Recipe) == [
        "recipe: lora_r: unknown key\n    is `adapter.r` in a recipe for `llmkit lora`"
    ]


def test_the_columns_that_settings_know_are_those_of_the_formats() -> None:
    assert {name: spec.fields for name, spec in FORMATS.items()} == COLUMN_FIELDS


# --- secrets --------------------------------------------------------------------------------------------------------

SECRETS = [
    "hf_" + "a1B2" * 8,
    "AKIA" + "ABCD1234EFGH5678",
    "ghp_" + "x" * 36,
    "https://user:s3cr3tpw@host/x",
    "s3://bucket/x?X-Amz-Signature=0123456789abcdef",
    "sk-" + "abcd1234" * 4,
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "key", ["data.train", "tracking.tags.x", "model.config_overrides.y", "train.max_steps", "bogus", "data.system"]
)
def test_secrets_are_refused_and_never_repeated(secret: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(SMALL, sft.Recipe, {key: secret})
    assert secret not in str(caught.value)
    assert "s3cr3tpw" not in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        parse(SMALL, sft.Recipe, [f"{key}={secret}", secret])
    assert secret not in str(caught.value)


def test_a_secret_by_its_key_is_refused() -> None:
    assert "looks like a secret" in of_data(small(tracking={"tags": {"api_key": "short"}}))[0]
    assert "HF_TOKEN" in of_data(SMALL | {"hf_token": "short"})[0]
    assert parse(small(tracking={"tags": {"tokenizer": "x", "keyboard": "y"}}), sft.Recipe)


def test_a_secret_put_in_behind_the_validation_is_masked_in_the_dump() -> None:
    recipe = parse(SMALL, sft.Recipe)
    leaky = recipe.model_copy(
        update={"output_dir": SECRETS[0], "tracking": TrackingSettings.model_construct(uri=SECRETS[3])}
    )
    text = dump(leaky)
    assert SECRETS[0] not in text
    assert "s3cr3tpw" not in text
    with pytest.raises(ValidationError) as caught:
        TrackingSettings(uri=SECRETS[3])
    assert "s3cr3tpw" not in str(caught.value)


# --- files that are no recipes --------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "r.yaml:1:1: the recipe is empty\n    `llmkit init STAGE` writes one to start from"),
        (b"# only a comment\n", "r.yaml:1:1: the recipe is empty\n    `llmkit init STAGE` writes one to start from"),
        (b"- a\n- b\n", "r.yaml:1:1: a recipe is a mapping of keys to values, this is a list\n    is it a data file?"),
        (b"hello\n", "r.yaml:1:1: a recipe is a mapping of keys to values, this is a single value"),
        (b"name: a\n\tseed: 1\n", "r.yaml:2:1: a tab; YAML is indented with spaces"),
        (b"name: a: b\n", "r.yaml:1:8: `: ` is not allowed here\n    quote text that holds `: `, and check the indentation"),
        (b"a: [1, 2\nb: 3\n", "r.yaml:2:2: a bracket or brace is not closed, or a comma is missing\n    it belongs to what begins in line 1"),
        (b'a: "x\nb: 3\n', "r.yaml:3:1: a quote is not closed\n    it belongs to what begins in line 1"),
        (b"a: *x\n", "r.yaml:1:4: `*name` refers to an anchor that is not defined\n    put text that begins with `*` in quotes"),
        (b"a: *.jsonl\n", "r.yaml:1:5: `*` and `&` mean anchors in YAML\n    put text that begins with them in quotes"),
        (b"a: @x\n", "r.yaml:1:4: this character cannot begin a value\n    put the text in quotes"),
        (b"name: a\nseed: 1\n  x: 2\n", "r.yaml:3:4: `: ` is not allowed here\n    quote text that holds `: `, and check the indentation"),
        (b"name: a\n---\nname: b\n", "r.yaml:2:1: a second YAML document (`---`)\n    a recipe is one document"),
        (b"name: caf\xe9\n", "r.yaml:1:10: not UTF-8: byte 0xe9\n    save the file as UTF-8"),
        ("name: 한\n".encode() + b"x: \xff\n", "r.yaml:2:4: not UTF-8: byte 0xff\n    save the file as UTF-8"),
        (b"name: a\nx: a\x00b\n", "r.yaml:2:5: a character that YAML does not allow"),
        (b"a: &a [*a]\n", "r.yaml:1:4: an anchor that contains itself"),
        (b"a: &a {b: *a}\n", "r.yaml:1:4: an anchor that contains itself"),
        (b"a: &a {<<: *a}\n", "r.yaml:1:4: an anchor that contains itself"),
        (b"a: " + b"[" * 5000, "r.yaml:1:43: blocks are nested more than 40 deep"),
        (LAUGHS.encode(), "r.yaml:1:4: more than 50,000 values when aliases (`*name`) are written out"),
        (b"x" * 300_000, "r.yaml: is larger than 256 KiB, too large for a recipe\n    is it a data file?"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_one_message(write: Callable[[bytes], str], text: bytes, message: str) -> None:
    began = time.perf_counter()
    found = mistakes(write(text))
    assert len(found) == 1
    where, _, rest = found[0].partition(": ")
    expected_where, _, expected = message.partition(": ")
    assert rest == expected
    if "50,000" not in message:
        assert where == expected_where
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name: a", "name: given twice, first at r.yaml:1:1\n    keep one of them"),
        ("1: x", 'the key 1 must be text\n    write "1"'),
        ("? [a]\n: x", "a key must be text\n    put text that begins with `{` or `[` in quotes"),
        ("seed: !!python/object/apply:os.system [x]", "seed: the tag !!python/object/apply:os.system is not known in a recipe"),
        ("seed: !!int x", "seed: !!int cannot be written like that"),
        ("seed: " + "9" * 5000, "seed: a number of more than 400 digits"),
        ("<<: 3", "`<<` merges a mapping or a list of mappings"),
    ],
)  # fmt: skip
def test_mistakes_after_which_reading_goes_on(write: Callable[[str], str], line: str, message: str) -> None:
    found = mistakes(write(f"name: a\nmodel: {{name_or_path: m}}\n{line}\ndata: {{train: 3}}\n"))
    assert any(problem.startswith("r.yaml:3:") and problem.endswith(message) for problem in found), found
    assert any("data.train: expected" in problem for problem in found)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes/sft").mkdir(parents=True)
    Path("recipes/sft/quick.yaml").write_text("name: a\n")
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("name: a\n")
    assert mistakes("recipes/sft/quik.yaml") == [
        "recipes/sft/quik.yaml: there is no such file\n    did you mean recipes/sft/quick.yaml?"
    ]
    assert mistakes("quick.yaml") == ["quick.yaml: there is no such file\n    did you mean recipes/sft/quick.yaml?"]
    assert mistakes("no/x.yaml") == ["no/x.yaml: there is no such file\n    there is no folder no"]
    assert mistakes("run") == ["run: is a folder, not a recipe\n    did you mean run/recipe.yaml?"]
    assert mistakes("x" * 5000)[0].endswith("cannot be read: File name too long")
    assert mistakes("a\0b")[0].endswith("embedded null byte")
    assert "cannot be read" in mistakes("run/recipe.yaml/x")[0]
    assert "too large" in mistakes("/dev/zero")[0]


def test_an_unreadable_file_is_one_message(write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("name: a\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no file mode keeps out
    assert mistakes(path) == ["r.yaml: cannot be read: Permission denied"]


def test_thousands_of_mistakes_are_a_hundred_and_a_count(write: Callable[[str], str]) -> None:
    began = time.perf_counter()
    found = mistakes(write("".join(f"trian{i}: 1\n" for i in range(15_000))))
    assert len(found) == 101
    assert found[-1] == "r.yaml: and 14,903 more mistakes"
    assert time.perf_counter() - began < 10


def test_keys_in_messages_are_printable_and_short(write: Callable[[str], str]) -> None:
    found = mistakes(write('"\\e[31m\\n": 1\n' + f"{'k' * 500}: 1\n{'hf_' + 'a' * 30}: 1\n" + "name: a\n"))
    text = "\n".join(found)
    assert r"r.yaml:1:1: \x1b[31m\n: unknown key" in text
    assert f"r.yaml:2:1: {'k' * 117}...: unknown key" in text
    assert "r.yaml:3:1: ***: unknown key" in text


def test_python_data_that_is_no_recipe() -> None:
    nested: dict[str, Any] = {}
    nested["x"] = nested
    assert "nested more than" in of_data(nested)[0]
    assert (
        "train.max_steps: expected a whole number of at least -1, got a set"
        in of_data(small(train={"max_steps": {1}}))[0]
    )


# --- dump and diff --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TRICKY = st.sampled_from(
    ["1e-5", "no", "null", "~", "", "<<", "=", "2026-11-21", "0o7", "1_000", "12:30", ".inf", "a: b", "# c", "- d", "*x", "&y", "!z",
     "%", "@", "`", "'", '"', "\t", "\n", " a ", "\u2028", "\ufeff", "\x85", "\x7f", "한", "😀", "true", "{", "[a]", "a\n\nb", "x" * 200]
)  # fmt: skip
WORDS = TEXT | TRICKY
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
SMALL_FLOATS = st.floats(0, 1, exclude_min=True, exclude_max=True)


@st.composite
def recipes(draw: st.DrawFn) -> lora.Recipe:
    source = st.builds(
        SourceSettings, path=st.just("a.jsonl"), weight=st.floats(1e-9, 1e9), split=WORDS.filter(_plain_words)
    )
    return lora.Recipe(
        name=draw(st.sampled_from(["a", "쇼핑", "no", "1e-5", "2026-11-21"])),
        seed=draw(st.integers(0, 2**32 - 1)),
        model=ModelSettings(
            name_or_path="m",
            init="from_config",
            config_overrides={"deep": draw(ANY.filter(_plain_words))},
        ),
        data=DataSettings(
            train=draw(source | st.lists(source | st.just("x.jsonl"), min_size=1, max_size=3)),
            eval=draw(st.none() | source | st.builds(EvalSplitSettings, split=SMALL_FLOATS)),
            system=draw(st.none() | WORDS.filter(_plain_words)),
        ),
        train=TrainSettings(learning_rate=draw(st.floats(1e-300, 1e300)), warmup_ratio=draw(SMALL_FLOATS)),
        tracking=TrackingSettings(tags=draw(st.dictionaries(WORDS, WORDS.filter(_plain_words), max_size=3))),
    )


def _plain_words(value: object) -> bool:
    return not any(sign in repr(value) for sign in ("$", "~/", "://"))


@settings(max_examples=150, deadline=None)
@given(recipes())
def test_what_is_dumped_is_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, recipe: lora.Recipe) -> None:
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    again = load_recipe(path, lora.Recipe)
    assert again == recipe
    assert diff(again, recipe) == []


def test_a_dump_is_complete_and_has_no_anchors() -> None:
    shared = {"a": [1, 2]}
    recipe = parse(
        small(
            model={"init": "from_config", "config_overrides": {"x": shared, "y": shared}},
            tracking={"tags": {"no": "1e-5"}},
        ),
        lora.Recipe,
    )
    text = dump(recipe)
    assert "&id" not in text
    assert "'1e-5'" in text
    assert set(yaml.safe_load(text)) == set(lora.Recipe.model_fields)
    assert "warmup_ratio: 0.03" in text


def test_diff_names_the_keys_that_differ() -> None:
    first = parse(small(data={"columns": {"prompt": "a"}}), lora.Recipe)
    second = parse(
        small(data={"columns": {"prompt": "b", "completion": "c"}}),
        lora.Recipe,
        ["train.max_steps=3", "adapter.r=4", "seed=1"],
    )
    assert diff(first, first) == []
    assert diff(first, second) == [
        "seed",
        "data.columns.prompt",
        "train.max_steps",
        "adapter.r",
        "data.columns.completion",
    ]


def test_reading_a_recipe_loads_nothing_heavy() -> None:
    code = (
        "import llmkit.recipe, llmkit.schema, llmkit.stages.lora, sys, json;"
        "heavy = ['torch', 'numpy', 'transformers', 'mlflow', 'pandas', 'datasets', 'peft', 'accelerate', 'pyarrow'];"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
