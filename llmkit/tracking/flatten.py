"""Nested settings as the flat ``key: text`` pairs that a tracker calls parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel

from llmkit.tracking.masking import environment_secrets, mask


def flatten(recipe: BaseModel | Mapping[str, object]) -> dict[str, str]:
    """Dotted keys and masked text values of a recipe or a mapping.

    Lists of plain values stay one value (JSON); lists that hold mappings are numbered: ``data.train.0.path``.
    None, True and False are written as in YAML: ``null``, ``true``, ``false``.
    """
    tree = recipe.model_dump(mode="json") if isinstance(recipe, BaseModel) else recipe
    flat: dict[str, str] = {}
    _walk("", tree, flat)
    secrets = environment_secrets()
    return {mask(key, secrets=secrets): mask(value, key=key, secrets=secrets) for key, value in flat.items()}


def _walk(prefix: str, value: object, flat: dict[str, str]) -> None:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            _walk(f"{prefix}.{key}" if prefix else str(key), item, flat)
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (Mapping, list, tuple, BaseModel)) for item in value
    ):
        for number, item in enumerate(value):
            _walk(f"{prefix}.{number}" if prefix else str(number), item, flat)
    else:
        flat[prefix] = _text(value)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, list, tuple, Mapping)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
