"""``KEY=VALUE``: what it sets, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from recipe_texts import mistakes, of_data, small

from llmkit.data.settings import EvalSplitSettings, SourceSettings
from llmkit.modeling.settings import AdapterSettings
from llmkit.recipe import load_recipe
from llmkit.stages import lora, sft


def test_overrides_set_make_and_clear(write_recipe: Callable[[str], str]) -> None:
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
    recipe = load_recipe(write_recipe(text), lora.Recipe, overrides)
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


def test_an_override_replaces_what_was_wrong_in_the_file(write_recipe: Callable[[str], str]) -> None:
    path = write_recipe("name: a\nmodel: {name_or_path: m}\ndata: {train: 3}\n")
    assert load_recipe(path, sft.Recipe, ["data.train=x.jsonl"]).data.train == "x.jsonl"
    assert mistakes(path, overrides=["data.train=[]"]) == ["command line: data.train: names no source"]
