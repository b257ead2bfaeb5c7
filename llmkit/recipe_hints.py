"""The second line of a message about a recipe: what was probably meant."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from llmkit.foreign_keys import FOREIGN_KEYS, FOREIGN_VALUES

if TYPE_CHECKING:
    from llmkit.recipe_errors import Kind


def close(word: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    names = list(known)
    plain = {name.lower().replace("_", ""): name for name in reversed(names)}
    wanted = word.lower().replace("-", "").replace("_", "").replace(" ", "")
    if wanted in plain:
        return plain[wanted]
    found = get_close_matches(wanted[:80], list(plain), n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a recipe type as ``(block, key)``, e.g. ``("train", "max_steps")``, outer blocks first."""
    from llmkit.recipe_errors import field_kinds

    inner: list[tuple[type[BaseModel], str]] = []
    for key, info in model.model_fields.items():
        yield prefix, key
        inner += [(kind.model, f"{prefix}.{key}" if prefix else key) for kind in field_kinds(info) if kind.model]
    for child, path in inner:
        yield from keys_of(child, path)


def key_hint(root: type[BaseModel], model: type[BaseModel], key: str, path: tuple[str | int, ...]) -> str:
    """What an unknown ``key`` in the block ``model`` of a recipe was meant to be; empty when nothing is like it."""
    said: dict[str, str] = getattr(model, "not_here", {})
    if key in said:
        return said[key]
    places = list(keys_of(root))
    here = ".".join(str(part) for part in path)
    dotted_keys = {f"{block}.{name}" if block else name for block, name in places}
    if "." in key and key in dotted_keys:
        block, _, name = key.rpartition(".")
        return f"write `{name}:` indented under `{block}:`, or {key}=VALUE on the command line"
    if elsewhere := [block for block, name in places if name == key and block != here]:
        return f"belongs under `{elsewhere[0]}:`" if elsewhere[0] else "belongs at the top level, not in a block"
    foreign = FOREIGN_KEYS.get(key.lower().replace("-", "_"))
    if foreign:
        return _foreign_hint(foreign, dotted_keys, here)
    if likely := close(key, model.model_fields):
        return f"did you mean `{likely}`?"
    if likely := close(key, [name for _, name in places], cutoff=0.8):
        block = next(block for block, name in places if name == likely)
        return f"did you mean `{likely}`, under `{block}:`?" if block else f"did you mean `{likely}`, at the top level?"
    return ""


def _foreign_hint(foreign: str, known: set[str], here: str) -> str:
    if " " in foreign:
        return foreign
    if foreign not in known:
        return f"is `{foreign}` in a recipe for `llmkit lora`"
    block, _, name = foreign.rpartition(".")
    if block == here:
        return f"here it is called `{name}`"
    return f"here it is `{name}`, under `{block}:`" if block else f"here it is `{name}`, at the top level"


def value_hint(alternatives: list[Kind], value: Any, path: tuple[str | int, ...]) -> str:
    """How to write a value of the wrong type so that it is right; empty when that is not plain."""
    allowed = {kind.type for kind in alternatives}
    choices = [c for k in alternatives if k.origin is Literal for c in typing.get_args(k.type) if isinstance(c, str)]
    if value is None:
        return "remove the line to take the default" if not isinstance(path[-1], int) else ""
    if isinstance(value, str):
        if hint := _text_hint(allowed, choices, value):
            return hint
    elif isinstance(value, (bool, int, float)) and (hint := _number_hint(allowed, value)):
        return hint
    lists = [kind for kind in alternatives if kind.is_list]
    if lists and isinstance(value, (str, int, float)) and str not in allowed:
        return f"write a list: [{_plain(value)}]"
    return ""


def _text_hint(allowed: set[Any], choices: list[str], value: str) -> str:
    foreign = FOREIGN_VALUES.get(value.lower())
    if foreign in choices:
        return f"did you mean `{foreign}`?"
    if likely := close(value, choices, cutoff=0.6):
        return f"did you mean `{likely}`?"
    if bool in allowed and value.lower() in ("yes", "no", "on", "off", "true", "false", "y", "n"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'true', 'y') else 'false'}"
    if allowed & {int, float}:
        number = value.strip().replace(",", "").replace("_", "")
        try:
            plain = float(number)
        except ValueError:
            return ""
        if float in allowed or plain.is_integer():
            return f"write {number}, without quotes" if number == value else f"write {number}"
    return ""


def _number_hint(allowed: set[Any], value: bool | int | float) -> str:
    if bool in allowed and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    if int in allowed and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if str in allowed:
        return f'write it in quotes: "{_plain(value)}"'
    return ""


def _plain(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)[:60]
