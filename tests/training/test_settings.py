"""What of a training recipe excludes what: quantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from recipe_texts import of_data, small

from llmkit.modeling.settings import ModelSettings, QuantizationSettings
from llmkit.recipe import dump, parse
from llmkit.stages import cpt, lora, sft


@pytest.mark.parametrize(
    ("blocks", "kind", "message"),
    [
        ({}, sft, "recipe: model.quantization: quantized weights cannot be trained themselves: a step is far smaller than their steps\n    train an adapter with `llmkit lora`, or remove this to train all weights"),
        ({}, cpt, "recipe: model.quantization: quantized weights cannot be trained themselves: a step is far smaller than their steps\n    add `adapter: {}`, or remove this to train all weights"),
        ({"adapter": {"init_lora_weights": "pissa"}}, lora, "recipe: adapter.init_lora_weights: pissa takes its start out of the weights and changes them, which quantized ones do not allow\n    use true or gaussian"),
        ({"train": {"torch_compile": True}}, lora, "recipe: train.torch_compile: does not go through the quantized layers of `model.quantization`\n    remove one of them"),
        ({"model": {"init": "from_config"}}, lora, "recipe: model.quantization: random weights are trained themselves, and quantized ones cannot be\n    remove it, or start from pretrained weights"),
        ({"model": {"quantization": {"type": "int8", "compute_dtype": "float16"}}}, lora, "recipe: model.quantization.compute_dtype: is a setting of `nf4`; `int8` has none\n    remove the line"),
        ({"model": {"quantization": {}}}, lora, "recipe: model.quantization.type: is missing. ``nf4``: 4 bits, values spread as a normal distribution is; ``int8``: 8 bits, one scale for each output."),
        ({"model": {"quantization": "4bit"}}, lora, "recipe: model.quantization: expected one of nf4, int8, a mapping (type, double_quant, compute_dtype), or null, got '4bit' (text)\n    did you mean `nf4`?"),
    ],
)  # fmt: skip
def test_quantization_is_for_what_can_stand_on_it(blocks: dict[str, Any], kind: Any, message: str) -> None:
    model = {"quantization": "nf4"} | blocks.get("model", {})
    assert of_data(small(**blocks | {"model": model}), kind.Recipe) == [message]


def test_the_short_form_is_the_long_one_with_its_defaults() -> None:
    recipe = parse(small(model={"quantization": "nf4"}), lora.Recipe)
    assert recipe.model.quantized == QuantizationSettings(type="nf4", double_quant=True, compute_dtype="bfloat16")
    assert ModelSettings(name_or_path="m").quantized is None
    assert parse(small(model={"quantization": "int8"}, adapter={"r": 4}), cpt.Recipe).model.quantized


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_long_form_is_read_back_from_a_frozen_recipe(kind: str) -> None:
    recipe = parse(small(model={"quantization": {"type": kind}}), lora.Recipe)
    assert parse(yaml.safe_load(dump(recipe)), lora.Recipe) == recipe
