"""``KEY=VALUE`` on the command line: dotted keys, values in YAML.

``train.max_steps=20``, ``data.train.0.weight=2``, ``data.eval={split: 0.1}``. Blocks that are missing are made on the
way. ``KEY=`` sets null, as an empty value does in YAML; empty text is ``KEY='""'``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.errors import Problem, RecipeError
from llmkit.yaml_positions import MAX_DEPTH, Document, KeyPath, Place, read

Overrides = Sequence[str] | Mapping[str, Any]

COMMAND_LINE = "command line"


class _Refused(Exception):  # noqa: N818  never leaves this module
    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def apply(document: Document, overrides: Overrides) -> list[Problem]:
    """Set each override in ``document.data`` and note its place; returns the mistakes in them."""
    if isinstance(overrides, str):
        overrides = [overrides]
    place = Place("overrides" if isinstance(overrides, Mapping) else COMMAND_LINE)
    items = overrides.items() if isinstance(overrides, Mapping) else [(text, None) for text in overrides]
    problems = []
    for text, value in items:
        key = str(text).partition("=")[0].strip() if place.source == COMMAND_LINE else str(text)
        try:
            if place.source == COMMAND_LINE:
                value = _parse(str(text))
            document.data = _set(document, _split(key), value, place)
        except _Refused as error:
            shown = key if "=" in str(text) or place.source != COMMAND_LINE else ""
            problems.append(Problem(str(place), shown, error.message, error.hint))
    return problems


def _parse(text: str) -> Any:
    key, equals, raw = text.partition("=")
    if not equals:
        raise _Refused(f"{text[:60]!r} is not KEY=VALUE", "for example train.learning_rate=1e-5")
    quote = f"quote the value twice: {key}='\"...\"'"
    try:
        document = read(raw, COMMAND_LINE)
    except RecipeError as error:
        raise _Refused(f"its value is not YAML: {error.problems[0].message}", quote) from None
    if document.problems:
        problem = document.problems[0]
        raise _Refused(problem.message.replace(f"{COMMAND_LINE}:1:", "character "), problem.hint)
    if isinstance(document.data, str) and " #" in raw and raw.strip()[:1] not in ("'", '"') and "\n" not in raw:
        raise _Refused("` #` begins a comment in YAML", quote)
    return document.data


def _split(key: str) -> KeyPath:
    parts = key.strip().split(".")
    if not all(parts):
        raise _Refused("is not a dotted key", "for example train.max_steps=20")
    if len(parts) > MAX_DEPTH:
        raise _Refused(f"is nested more than {MAX_DEPTH} deep")
    return tuple(parts)


def _set(document: Document, path: KeyPath, value: Any, place: Place) -> Any:
    """``document.data`` with ``value`` at ``path``; the containers on the way are copied, not changed."""
    root = dict(document.data) if isinstance(document.data, dict) else document.data
    if root is None:
        root = {}
    holder, done = root, ()  # type: tuple[Any, KeyPath]
    for part in path[:-1]:
        slot = _slot(holder, part, done)
        inner = holder[slot] if isinstance(slot, int) else holder.get(slot)
        holder[slot] = inner = {} if inner is None else inner.copy() if isinstance(inner, (dict, list)) else inner
        done = (*done, slot)
        document.keys.setdefault(done, place)
        holder = inner
    slot = _slot(holder, path[-1], done)
    holder[slot] = value
    full = (*done, slot)
    document.forget(full)
    _note(document, full, value, place)
    return root


def _slot(holder: Any, part: str | int, done: KeyPath) -> str | int:
    """The key or the index of ``part`` in ``holder``."""
    above = ".".join(str(p) for p in done) or "the recipe"
    if isinstance(holder, dict):
        return str(part)
    if not isinstance(holder, list):
        raise _Refused(f"`{above}` is not a block, so nothing can be set in it")
    index = int(part) if str(part).isdecimal() and len(str(part)) < 10 else -1
    if not 0 <= index < len(holder):
        allowed = f"its entries are 0 to {len(holder) - 1}" if holder else "it is empty"
        raise _Refused(f"`{above}` is a list, and {allowed}", f"give the whole list: {above}=[...]")
    return index


def _note(document: Document, path: KeyPath, value: Any, place: Place) -> None:
    document.keys[path] = document.values[path] = replace(place)
    if len(path) > 2 * MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _note(document, (*path, str(key)), item, place)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _note(document, (*path, i), item, place)
