"""The base of every block of a recipe: what settings are, and which values no block may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from llmkit.recipe_errors import Conflict
from llmkit.secrets import find, mask, names_secret


class Settings(BaseModel):
    """A block of a recipe: frozen, strict about types, without unknown keys; the string below a field documents it.

    A subclass tells what is wrong between its settings by ``conflicts``, and by ``not_here`` (key: advice) which key
    of another recipe does not belong into it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
        hide_input_in_errors=True,
    )
    not_here: ClassVar[Mapping[str, str]] = {}
    free_text: ClassVar[frozenset[str]] = frozenset()

    def conflicts(self) -> Iterator[Conflict]:
        """Settings that are fine each, and wrong together."""
        return iter(())

    def all_conflicts(self) -> Iterator[Conflict]:
        """``conflicts``, and values that no block may hold: secrets, variables that nobody expands, NaN."""
        for name in type(self).model_fields:
            yield from _value_conflicts(getattr(self, name, None), name, name in self.free_text)
        yield from self.conflicts()

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [f"{c.key}: {c.message}" + (f" ({c.hint})" if c.hint else "") for c in self.all_conflicts()]
        if found:
            raise PydanticCustomError("conflict", "{text}", {"text": mask("; ".join(found))})
        return self


def _value_conflicts(value: Any, key: str, free: bool) -> Iterator[Conflict]:
    """What is wrong with a plain value (blocks look after themselves), whatever its setting is."""
    if isinstance(value, str):
        yield from _text_conflicts(value, key, free)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Conflict(key, f"expected a finite number, got {value}")
    elif isinstance(value, dict):
        for name, item in value.items():
            if names_secret(str(name)) and isinstance(item, str) and item:
                yield Conflict(f"{key}.{name}", "looks like a secret", _NO_SECRETS)
            elif find(str(name)):
                yield Conflict(key, "a key in it looks like a secret", _NO_SECRETS)
            else:
                yield from _text_conflicts(str(name), key, True)
                yield from _value_conflicts(item, f"{key}.{name}", free)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _value_conflicts(item, f"{key}.{i}", free)


_NO_SECRETS = (
    "a recipe holds no secrets: set it in the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD)"
)
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?")


def _text_conflicts(value: str, key: str, free: bool) -> Iterator[Conflict]:
    if what := find(value):
        yield Conflict(key, f"holds {what}", _NO_SECRETS)
    if any("\ud800" <= c <= "\udfff" or c == "\0" for c in value):
        yield Conflict(key, "holds a character that no file can hold (NUL or half of a surrogate pair)")
    if free:
        return
    if variable := _VARIABLE.search(value):
        hint = f'write the value, or let the shell expand it: {key}="..." on the command line'
        yield Conflict(key, f"{variable.group()} is not expanded in a recipe", hint)
    if value.startswith("~/"):
        hint = "write the whole path, or one relative to the working directory"
        yield Conflict(key, "`~` is not expanded in a recipe", hint)
