"""Recipes: what is read, and that what is written is read back the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import FROM_THE_ISSUE, SMALL, mistakes, of_data, small

from llmkit.data.settings import DataSettings, EvalSplitSettings, SourceSettings
from llmkit.modeling.settings import AdapterSettings, ModelSettings
from llmkit.recipe import TrackingSettings, diff, dump, load_recipe, parse
from llmkit.stages import lora, sft
from llmkit.training.settings import TrainSettings


def test_the_recipe_of_the_issue_runs_as_lora_and_without_its_adapter_as_sft(
    write_recipe: Callable[[str], str],
) -> None:
    recipe = load_recipe(write_recipe(FROM_THE_ISSUE), lora.Recipe)
    assert recipe.train.learning_rate == 2e-5
    assert recipe.data.eval == EvalSplitSettings(split=0.02)
    assert recipe.adapter == AdapterSettings(r=16, lora_alpha=32, lora_dropout=0.05)
    without = "".join(line for line in FROM_THE_ISSUE.splitlines(keepends=True) if not line.startswith("adapter"))
    assert load_recipe(write_recipe(without), sft.Recipe).output_dir == "runs/gsm8k-sft"
    assert mistakes(write_recipe(FROM_THE_ISSUE), sft.Recipe) == [
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


def test_anchors_and_merge_keys_work_and_own_keys_win(write_recipe: Callable[[str], str]) -> None:
    text = """
name: a
model: {name_or_path: m}
data:
  train:
    - &one {path: a.jsonl, weight: 2, split: x}
    - {<<: *one, path: b.jsonl}
    - {<<: [{weight: 3}, *one], path: c.jsonl}
"""
    sources = load_recipe(write_recipe(text), sft.Recipe).data.train
    assert sources == [
        SourceSettings(path="a.jsonl", weight=2, split="x"),
        SourceSettings(path="b.jsonl", weight=2, split="x"),
        SourceSettings(path="c.jsonl", weight=3, split="x"),
    ]


def test_output_dir_is_made_of_the_name() -> None:
    assert parse(SMALL, sft.Recipe).output_dir == "runs/n"
    assert parse(SMALL | {"name": "쇼핑 의도"}, sft.Recipe).output_dir == "runs/쇼핑 의도"


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(write_recipe: Callable[[bytes], str]) -> None:
    text = b"\xef\xbb\xbf" + FROM_THE_ISSUE.replace("\n", "\r\n").encode()
    assert load_recipe(write_recipe(text), lora.Recipe).name == "gsm8k-sft"


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
