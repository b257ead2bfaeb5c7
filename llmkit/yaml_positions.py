"""YAML 1.2 for recipes: plain values, and the line and column of every key and value.

PyYAML reads YAML 1.1, where ``1e-5`` is text, ``no`` is false, ``012`` is ten and ``2026-11-21`` a date. Here its
parser is used through ``compose`` only, and scalars are resolved by the core schema of YAML 1.2.2 (section 10.3.2).
Nothing a file holds can raise anything but RecipeError: size, depth and the expansion of aliases are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.error import Mark, MarkedYAMLError, YAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from llmkit.errors import Problem, RecipeError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_NODES = 50_000
MAX_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_SCALARS: list[tuple[str, str, list[str | None]]] = [
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", None]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
]


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written. ``line`` and ``column`` count from 1; 0 where there are none."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass
class Document:
    """A recipe as read: plain data, the place of each key and of each value, and mistakes found on the way."""

    data: Any
    root: Place
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def key_place(self, path: KeyPath) -> Place:
        """Place of a key, or of the nearest block around it that was written down."""
        return _nearest(self.keys, path) or self.root

    def value_place(self, path: KeyPath) -> Place:
        return self.values[path] if path in self.values else self.key_place(path)

    def forget(self, path: KeyPath) -> None:
        """Drop the places of everything at and below ``path``, before it is replaced."""
        for places in (self.keys, self.values):
            for known in [k for k in places if k[: len(path)] == path]:
                del places[known]


def _nearest(places: dict[KeyPath, Place], path: KeyPath) -> Place | None:
    return next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def add_core_schema(cls: type[yaml.resolver.BaseResolver]) -> None:
    """Give a PyYAML loader or dumper the implicit types of YAML 1.2."""
    for tag, pattern, first in _SCALARS:
        cls.add_implicit_resolver(_TAG + tag, re.compile(rf"^{pattern}$"), first)


class _Loader(yaml.SafeLoader):
    """Composes nodes; ``depth`` bounds the nesting before Python's own stack does."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        try:
            if self.depth > MAX_DEPTH:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise MarkedYAMLError(problem=_TOO_DEEP, problem_mark=mark)
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_TOO_DEEP = f"blocks are nested more than {MAX_DEPTH} deep"
_Loader.yaml_implicit_resolvers = {}
add_core_schema(_Loader)

_EXPLAINED = {
    "'\\t'": ("a tab; YAML is indented with spaces", ""),
    "mapping values are not allowed": (
        "`: ` is not allowed here",
        "quote text that holds `: `, and check the indentation",
    ),
    "expected <block end>": ("this does not line up with its block", "check the indentation, also above"),
    "could not find expected ':'": ("a key without a colon", "write `key: value`"),
    "undefined alias": ("`*name` refers to an anchor that is not defined", "put text that begins with `*` in quotes"),
    "expected alphabetic or numeric": ("`*` and `&` mean anchors in YAML", "put text that begins with them in quotes"),
    "cannot start any token": ("this character cannot begin a value", "put the text in quotes"),
    "expected ',' or": ("a bracket or brace is not closed, or a comma is missing", ""),
    "expected the node content": ("a bracket or brace is not closed, or a value is missing", ""),
    "unexpected end of stream": ("a quote is not closed", ""),
    "but found another document": ("a second YAML document (`---`)", "a recipe is one document"),
}


def read(text: str, source: str) -> Document:
    """Parse ``text``; ``source`` names it in messages.

    Raises RecipeError for a syntax error. Mistakes after which reading can go on (a key given twice) are collected
    in the document's ``problems``.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except ReaderError as error:
        raise _fail(_offset_place(text, int(error.position), source), "a character that YAML does not allow") from None
    except MarkedYAMLError as error:
        raise _syntax_error(error, source) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise _fail(Place(source, 1, 1), f"is not YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        return Document(None, Place(source, 1, 1))
    builder = _Builder(source)
    document = Document(None, Place(source, 1, 1), builder.keys, builder.values, builder.problems)
    document.data = builder.build(node, ())
    return document


def read_file(path: str | Path) -> Document:
    """Read a recipe file. Raises RecipeError, whatever is wrong with the file."""
    source = str(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _fail(Place(source), "there is no such file", _near(Path(path))) from None
    except IsADirectoryError:
        frozen = Path(path) / "recipe.yaml"
        hint = f"did you mean {frozen}?" if frozen.is_file() else ""
        raise _fail(Place(source), "is a folder, not a recipe", hint) from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _fail(Place(source), f"cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        message = f"is larger than {MAX_BYTES // 1024} KiB, too large for a recipe"
        raise _fail(Place(source), message, "is it a data file?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _offset_place(raw[: error.start].decode("utf-8", "replace"), None, source)
        raise _fail(place, f"not UTF-8: byte 0x{raw[error.start]:02x}", "save the file as UTF-8") from None
    return read(text, source)


def _fail(place: Place, message: str, hint: str = "") -> RecipeError:
    return RecipeError([Problem(str(place), "", message, hint)])


def _near(path: Path) -> str:
    """Did-you-mean for a file that is not there: similar names near it, else the recipes there are."""
    from difflib import get_close_matches

    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(str(p) for pattern in ("*.y*ml", "*/*.y*ml", "*/*/*.y*ml") for p in _glob(folder, pattern))
    exact = [n for n in names if Path(n).stem == path.stem]
    found = exact or get_close_matches(str(path), names, n=1, cutoff=0.7)
    if found:
        return f"did you mean {found[0]}?"
    beside = [n for n in names if Path(n).parent == folder][:5]
    return f"recipes there: {', '.join(beside)}" if beside else ""


def _glob(folder: Path, pattern: str) -> Iterator[Path]:
    from itertools import islice

    found = (p for p in folder.glob(pattern) if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    try:
        yield from islice(found, 200)
    except OSError:
        return  # a folder that cannot be listed has nothing to suggest


def _offset_place(text: str, offset: int | None, source: str) -> Place:
    before = text[:offset]
    line_start = before.rfind("\n") + 1
    return Place(source, before.count("\n") + 1, len(before) - line_start + 1)


def _mark(mark: Mark | None, source: str) -> Place:
    return Place(source, mark.line + 1, mark.column + 1) if mark else Place(source, 1, 1)


def _syntax_error(error: MarkedYAMLError, source: str) -> RecipeError:
    problem = error.problem or error.context or "syntax error"
    place = _mark(error.problem_mark or error.context_mark, source)
    message, hint = next((v for k, v in _EXPLAINED.items() if k in problem), (problem, ""))
    opened = error.context_mark
    if opened and error.problem_mark and opened.line != error.problem_mark.line and not hint:
        hint = f"it belongs to what begins in line {opened.line + 1}"
    return _fail(place, message, hint)


class _Builder:
    """Turns composed nodes into plain data, noting places and mistakes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.keys: dict[KeyPath, Place] = {}
        self.values: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []
        self._open: list[Node] = []
        self._nodes = 0

    def _problem(self, node: Node, path: KeyPath, message: str, hint: str = "") -> None:
        self.problems.append(Problem(str(_mark(node.start_mark, self.source)), dotted(path), message, hint))

    def _enter(self, node: Node) -> None:
        if any(node is other for other in self._open):
            raise _fail(_mark(node.start_mark, self.source), "an anchor that contains itself")
        if len(self._open) >= MAX_DEPTH:
            raise _fail(_mark(node.start_mark, self.source), _TOO_DEEP)
        self._open.append(node)

    def build(self, node: Node, path: KeyPath) -> Any:
        self._count(node)
        self.values[path] = _mark(node.start_mark, self.source)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self._enter(node)
        try:
            if node.tag not in (_TAG + "map", _TAG + "seq"):
                self._problem(node, path, f"the tag {_short_tag(node.tag)} is not known in a recipe")
            if isinstance(node, SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.pop()

    def _count(self, node: Node) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            place = _mark(node.start_mark, self.source)
            raise _fail(place, f"more than {MAX_NODES:,} values when aliases (`*name`) are written out")

    def _mapping(self, node: Node, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, (key_node, value_node) in self._pairs(node, path).items():
            inner = (*path, key)
            self.keys[inner] = _mark(key_node.start_mark, self.source)
            result[key] = self.build(value_node, inner)
        return result

    def _pairs(self, node: Node, path: KeyPath) -> dict[str, tuple[Node, Node]]:
        """A mapping's own keys, then what ``<<`` merges in (own keys win, then the first merged)."""
        own: dict[str, tuple[Node, Node]] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                continue
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in own:
                first = _mark(own[key][0].start_mark, self.source)
                self._problem(key_node, (*path, key), f"given twice, first at {first}", "keep one of them")
                continue
            own[key] = (key_node, value_node)
        for other in merged:
            self._count(other)
            if not isinstance(other, MappingNode):
                self._problem(other, path, "`<<` merges a mapping or a list of mappings")
                continue
            self._enter(other)
            for key, pair in self._pairs(other, path).items():
                own.setdefault(key, pair)
            self._open.pop()
        return own

    def _key(self, node: Node, path: KeyPath) -> str | None:
        if not isinstance(node, ScalarNode):
            self._problem(node, path, "a key must be text", "put text that begins with `{` or `[` in quotes")
        elif node.tag != _TAG + "str":
            key = node.value[:40]
            self._problem(node, path, f"the key {key or '(empty)'} must be text", f'write "{key}"')
        else:
            return str(node.value)
        return None

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "str":
            return text
        if kind == "merge":
            return text
        pattern = next((p for name, p, _ in _SCALARS if name == kind), None)
        if pattern is None or node.tag == kind:
            self._problem(node, path, f"the tag {_short_tag(node.tag)} is not known in a recipe")
            return text
        if kind == "float" and re.fullmatch(_SCALARS[2][1], text):
            return float(text) if len(text) < MAX_DIGITS else math.inf
        if not re.fullmatch(pattern, text):
            self._problem(node, path, f"!!{kind} cannot be written like that")
            return text
        if kind in ("int", "float") and len(text) > MAX_DIGITS:
            self._problem(node, path, f"a number of more than {MAX_DIGITS} digits")
            return 0
        return _scalar_value(kind, text)


def _scalar_value(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    special = text.lower().lstrip("+-")
    if special in (".inf", ".nan"):
        return math.nan if special == ".nan" else (-math.inf if text[0] == "-" else math.inf)
    return float(text)


def _short_tag(tag: str) -> str:
    return tag.replace(_TAG, "!!")[:40]
