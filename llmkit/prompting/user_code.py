"""The ``python`` assertion's code: a function in a file, an expression, or a few lines that end with ``return``."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError

Function = Callable[[str, Mapping[str, Any]], Any]
_FILE = re.compile(r"(?:file://)?(?P<path>[^\n]+\.py)(?::(?P<name>[A-Za-z_]\w*))?")
DEFAULT_NAME = "get_assert"


def check_code(value: str) -> str:
    """What is wrong with code as it is written; empty for a file, which is looked at when the run begins."""
    if _FILE.fullmatch(value.strip()):
        return ""
    try:
        _parse(value)
    except SyntaxError as error:
        return f"is neither file.py:function nor Python: {error.msg} (line {error.lineno})"
    return ""


class UserCode:
    """Code of an assertion, loaded once."""

    @staticmethod
    @cache
    def load(value: str) -> Function:
        """The function, called as ``f(output, context)``. Raises UsageError for a file or function that is not there."""
        named = _FILE.fullmatch(value.strip())
        return _from_file(Path(named["path"]), named["name"] or DEFAULT_NAME) if named else _from_text(value)


def file_of(value: str) -> Path | None:
    """The file that the code is in; None for code that is written in place."""
    named = _FILE.fullmatch(value.strip())
    return Path(named["path"]) if named else None


def _from_file(path: Path, name: str) -> Function:
    if not path.is_file():
        raise UsageError(f"python: there is no file {path} (paths are relative to the working directory)")
    spec = importlib.util.spec_from_file_location(f"llmkit_assertion_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"python: {path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"python: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(n for n, item in vars(module).items() if callable(item) and not n.startswith("_"))
        raise UsageError(f"python: {path} has no function {name}; it has {', '.join(there) or 'none'}")
    made: Function = function
    return made


def _parse(value: str) -> ast.Module:
    """The code as the body of a function; a single expression is what it gives back."""
    text = textwrap.dedent(value).strip()
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        body = text
    else:
        body = f"return ({text}\n)"
    return ast.parse("def check(output, context):\n" + textwrap.indent(body, "    "))


def _from_text(value: str) -> Function:
    scope: dict[str, Any] = {}
    exec(compile(_parse(value), "<assertion>", "exec"), scope)  # the recipe is the user's own program
    made: Function = scope["check"]
    return made
