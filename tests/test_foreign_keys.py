"""Keys and values that users know from other tools [25]."""

from __future__ import annotations

from recipe_texts import SMALL, of_data

from llmkit.data.formats import FORMATS
from llmkit.data.settings import COLUMN_FIELDS
from llmkit.foreign_keys import FOREIGN_KEYS, FOREIGN_VALUES
from llmkit.recipe_hints import keys_of
from llmkit.stages import lora, sft


def test_foreign_keys_lead_to_keys_that_exist() -> None:
    known = {f"{block}.{key}" if block else key for block, key in keys_of(lora.Recipe)}
    targets = {target for target in FOREIGN_KEYS.values() if " " not in target}
    assert targets <= known
    assert len(FOREIGN_KEYS) >= 60
    named = [word for text in FOREIGN_KEYS.values() if " " in text for word in text.split("`")[1::2]]
    settings_named = {word.split(":")[0] for word in named if "." in word.split(" ")[0] and not word.startswith("--")}
    assert settings_named <= known
    ours = {key for block, key in keys_of(lora.Recipe) if not block}
    assert {
        key for key in ours & set(FOREIGN_KEYS) if FOREIGN_KEYS[key] != key
    } == set()  # in a block, some stand at the top


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
