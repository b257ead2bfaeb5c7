"""Every mistake of a recipe, in words: what is allowed, what was found, what was probably meant.

pydantic decides whether a recipe is valid. When it is not, ``find_problems`` walks the settings and the document side
by side and explains. It follows, in a union such as ``str | list | SourceSettings``, only the alternative that the
user evidently wrote, so that one mistake gives one message.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llmkit.errors import Problem
from llmkit.recipe_hints import close, key_hint, value_hint
from llmkit.secrets import mask
from llmkit.yaml_positions import Document, KeyPath, Place, dotted

MOST_PROBLEMS = 100
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class Conflict(NamedTuple):
    """Settings that are fine each, and wrong together. Keys are dotted, relative to the block that reports it."""

    key: str
    message: str
    hint: str = ""
    also: tuple[str, ...] = ()


@runtime_checkable
class Checked(Protocol):
    def all_conflicts(self) -> Iterator[Conflict]: ...


@dataclass(frozen=True)
class Kind:
    """One alternative of an annotation: its type, and the constraints on it."""

    type: Any
    metadata: tuple[Any, ...] = ()

    @property
    def origin(self) -> Any:
        return typing.get_origin(self.type)

    @property
    def model(self) -> type[BaseModel] | None:
        return self.type if isinstance(self.type, type) and issubclass(self.type, BaseModel) else None

    @property
    def is_list(self) -> bool:
        return self.origin is list

    @property
    def is_mapping(self) -> bool:
        return self.origin is dict

    @property
    def is_leaf(self) -> bool:
        return not (self.model or self.is_list or self.is_mapping)


def kinds(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[Kind]:
    """The alternatives of an annotation, unions and ``Annotated`` unfolded."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *extra = typing.get_args(annotation)
        flat = [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])]
        return kinds(inner, (*metadata, *flat))
    if origin in (typing.Union, types.UnionType):
        return [kind for arg in typing.get_args(annotation) for kind in kinds(arg, metadata)]
    return [Kind(annotation, metadata)]


def field_kinds(info: FieldInfo) -> list[Kind]:
    return kinds(info.annotation, tuple(info.metadata))


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "any value",
}


def describe(alternatives: list[Kind]) -> str:
    """What may stand there, in words: ``a whole number of at least 1, or null``."""
    plain = [_describe_one(kind) for kind in alternatives if not kind.is_list]
    lists = [_describe_list(kind, plain) for kind in alternatives if kind.is_list]
    null = [word for word in plain if word == "null"]
    words = list(dict.fromkeys([word for word in plain if word != "null"] + lists + null))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + (", or " if len(words) > 2 else " or ") + words[-1]


def _describe_one(kind: Kind) -> str:
    if kind.model:
        return f"a mapping ({', '.join(kind.model.model_fields)})" if len(kind.model.model_fields) < 7 else "a mapping"
    if kind.is_mapping:
        inner = typing.get_args(kind.type)[1]
        return "a mapping" if inner is Any else f"a mapping of names to {describe(kinds(inner))}"
    if kind.origin is Literal:
        values = [str(v) for v in typing.get_args(kind.type)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    return _NAMES.get(kind.type, str(kind.type)) + _describe_limits(kind.metadata)


def _describe_list(kind: Kind, beside: list[str]) -> str:
    inner = kinds(typing.get_args(kind.type)[0])
    if len(inner) > 1 and all(_describe_one(item) in beside for item in inner):
        return "a list of these"
    return f"a list of {describe(inner)}"


def _describe_limits(metadata: tuple[Any, ...]) -> str:
    words = []
    for limit in metadata:
        if isinstance(limit, Ge):
            words.append(f"at least {limit.ge}")
        elif isinstance(limit, Gt):
            words.append(f"more than {limit.gt}")
        elif isinstance(limit, Le):
            words.append(f"at most {limit.le}")
        elif isinstance(limit, Lt):
            words.append(f"less than {limit.lt}")
    return " of " + " and ".join(words) if words else ""


def show(value: Any) -> str:
    """A value as YAML shows it, with its kind, short and without secrets."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = mask(value)
        return repr(text if len(text) <= 60 else text[:57] + "...") + " (text)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, (int, float)):
        return str(value)[:60]
    return f"a {type(value).__name__}"


class _Bad:
    """Stands for a value that is wrong, so that the rest of its block can still be looked at."""


_BAD = _Bad()


@dataclass
class _Finder:
    root: type[BaseModel]
    document: Document

    def __post_init__(self) -> None:
        self.found: list[tuple[Place, Problem]] = []
        self.bad: set[KeyPath] = set()

    def report(self, place: Place, path: KeyPath, message: str, hint: str = "") -> _Bad:
        self.bad.add(path)
        self.found.append((place, Problem(str(place), dotted(path), message, hint)))
        return _BAD

    def value(self, alternatives: list[Kind], value: Any, path: KeyPath) -> Any:
        """The value, made of settings where it is a block, or _BAD after reporting."""
        if isinstance(value, dict):
            if models := [kind.model for kind in alternatives if kind.model]:
                return self.block(max(models, key=lambda model: _likeness(model, value)), value, path)
            if mapping := next((kind for kind in alternatives if kind.is_mapping), None):
                inner = kinds(typing.get_args(mapping.type)[1])
                return self.children({k: self.value(inner, v, (*path, k)) for k, v in value.items()})
        elif isinstance(value, list):
            if lists := [kind for kind in alternatives if kind.is_list]:
                inner = kinds(typing.get_args(lists[0].type)[0])
                return self.children([self.value(inner, v, (*path, i)) for i, v in enumerate(value)])
        elif leaves := [kind for kind in alternatives if kind.is_leaf]:
            for kind in leaves:
                try:
                    return TypeAdapter(_annotated(kind), config=_STRICT).validate_python(value)
                except ValidationError:
                    continue
        if any(kind.type is Any for kind in alternatives):
            return value
        if value == "" and any(isinstance(m, MinLen) for kind in alternatives for m in kind.metadata):
            return self.report(self.document.value_place(path), path, "must not be empty")
        message = f"expected {describe(alternatives)}, got {show(value)}"
        return self.report(self.document.value_place(path), path, message, value_hint(alternatives, value, path))

    def children(self, made: Any) -> Any:
        items = made.values() if isinstance(made, dict) else made
        return _BAD if any(item is _BAD for item in items) else made

    def block(self, model: type[BaseModel], value: dict[str, Any], path: KeyPath) -> BaseModel:
        made: dict[str, Any] = {}
        suggested: set[str] = set()
        for key, item in value.items():
            info = model.model_fields.get(key)
            if info is None:
                self.unknown(model, key, path, suggested)
                continue
            child = self.value(field_kinds(info), item, (*path, key))
            if child is not _BAD:
                made[key] = child
        for key, info in model.model_fields.items():
            if info.is_required() and key not in value and key not in suggested:
                self.missing(info, (*path, key))
            if info.is_required() and key not in made:
                made[key] = _stand_in(field_kinds(info))
        return model.model_construct(**made)

    def unknown(self, model: type[BaseModel], key: str, path: KeyPath, suggested: set[str]) -> None:
        hint = key_hint(self.root, model, key, path) if len(self.found) <= MOST_PROBLEMS else ""
        suggested.update(name for name in model.model_fields if f"`{name}`" in hint)
        message = "unknown key"
        if not hint:
            message += f"; {'the keys here' if path else 'the keys of a recipe'} are {', '.join(model.model_fields)}"
        self.report(self.document.key_place((*path, key)), (*path, key), message, hint)

    def missing(self, info: FieldInfo, path: KeyPath) -> None:
        meaning = (info.description or "").split("\n")[0]
        self.report(self.document.key_place(path), path, f"is missing. {meaning}".strip())

    def conflicts(self, block: Any, path: KeyPath = ()) -> None:
        """Report what is wrong between settings, unless one of them was wrong by itself."""
        if isinstance(block, list):
            for i, item in enumerate(block):
                self.conflicts(item, (*path, i))
        if not isinstance(block, BaseModel):
            return
        for name in type(block).model_fields:
            self.conflicts(getattr(block, name, None), (*path, name))
        for conflict in block.all_conflicts() if isinstance(block, Checked) else ():
            keys = [(*path, *_split(key)) for key in (conflict.key, *conflict.also)]
            if not any(bad == key[: len(bad)] or key == bad[: len(key)] for bad in self.bad for key in keys):
                place = self.document.value_place(keys[0])
                self.found.append((place, Problem(str(place), dotted(keys[0]), conflict.message, conflict.hint)))


def find_problems(recipe_type: type[BaseModel], document: Document) -> list[Problem]:
    """Every mistake in ``document``, in the order of the file; empty when this walk finds none."""
    finder = _Finder(recipe_type, document)
    finder.conflicts(finder.block(recipe_type, document.data, ()))
    file = document.root.source
    return [p for _, p in sorted(finder.found, key=lambda pair: (pair[0].source != file, pair[0]))]


def remaining(error: ValidationError, document: Document) -> list[Problem]:
    """pydantic's own messages, for what the walk cannot explain."""
    found = [(tuple(e["loc"]), e["msg"]) for e in error.errors()]
    return [Problem(str(document.value_place(path)), dotted(path), message) for path, message in found]


def tidy(problems: list[Problem], source: str) -> list[Problem]:
    """Problems fit for a terminal: no secret, control character or endless key in them, and not thousands of them."""
    shown = [
        Problem(p.where, _printable(p.key, 120), _printable(p.message, 4000), _printable(p.hint, 400))
        for p in problems[:MOST_PROBLEMS]
    ]
    if len(problems) > MOST_PROBLEMS:
        shown.append(Problem(source, "", f"and {len(problems) - MOST_PROBLEMS:,} more mistakes"))
    return shown


def _printable(text: str, most: int) -> str:
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in mask(text))
    return clean if len(clean) <= most else clean[: most - 3] + "..."


def _split(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split(".")) if key else ()


def _annotated(kind: Kind) -> Any:
    return Annotated[(kind.type, *kind.metadata)] if kind.metadata else kind.type


def _likeness(model: type[BaseModel], value: dict[str, Any]) -> tuple[float, int]:
    """How well keys fit a model: those it knows (nearly known ones count half), then fewest missing."""
    fields = model.model_fields
    known = sum(1.0 if key in fields else 0.5 if close(key, fields) else 0.0 for key in value)
    return known, -sum(info.is_required() and key not in value for key, info in fields.items())


def _stand_in(alternatives: list[Kind]) -> Any:
    kind = alternatives[0]
    if kind.model:
        fields = kind.model.model_fields.items()
        return kind.model.model_construct(**{k: _stand_in(field_kinds(i)) for k, i in fields if i.is_required()})
    return cast(Any, {str: "x", float: 0.5, int: 1, bool: False}.get(kind.type, "x"))
