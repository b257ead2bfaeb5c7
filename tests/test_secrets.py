"""Secrets in a recipe are refused and never repeated [34]."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from recipe_texts import SMALL, of_data, small

from llmkit.errors import RecipeError
from llmkit.recipe import TrackingSettings, dump, parse
from llmkit.stages import sft

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
