"""Profiles: the launch settings of a site, kept apart from recipes. ``--profile NAME`` is ``slurm/NAME.yaml`` or
``k8s/NAME.yaml`` in the working directory; ``--profile PATH`` is a file.

A profile is written as the block ``launch:`` of a recipe, without that line. What the recipe and the command line say
wins over it, key by key. Its own mistakes are reported like a recipe's, with its file and line.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmkit.errors import RecipeError, UsageError
from llmkit.launch_settings import LaunchSettings
from llmkit.recipe_errors import find_problems, remaining, tidy
from llmkit.yaml_positions import Document, read_file

FOLDERS = ("slurm", "k8s")


def find_profile(name: str) -> Path:
    """The file of a profile. ``UsageError`` where there is none, with those that there are."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise UsageError(f"--profile {name}: there is no such file.")
    found = [path for folder in FOLDERS if (path := Path(folder, f"{name}.yaml")).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--profile {name}: it could be {' or '.join(map(str, found))}. Give the path.")
    known = sorted(path.stem for folder in FOLDERS for path in Path(folder).glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    there = f" There are: {', '.join(known)}." if known else " There is no slurm/*.yaml and no k8s/*.yaml here."
    raise UsageError(f"--profile {name}: there is no such profile.{hint}{there}")


def read_profile(name: str) -> dict[str, Any]:
    """The keys that a profile sets. ``RecipeError`` with every mistake in it."""
    document = read_file(find_profile(name))
    if document.data is None:
        return {}
    problems = list(document.problems)
    try:
        LaunchSettings.model_validate(document.data)
    except ValidationError as error:
        problems += find_problems(LaunchSettings, document) or remaining(error, document)
    if problems or not isinstance(document.data, dict):
        raise RecipeError(tidy(problems, document.root.source), what="profile")
    return document.data


def put_under(document: Document, profile: str | None) -> None:
    """Set in a recipe's ``launch:`` what it leaves open and the profile says."""
    if profile is None or not isinstance(document.data, dict):
        return
    given = document.data.get("launch")
    if given is None or isinstance(given, dict):
        document.data = document.data | {"launch": _under(given or {}, read_profile(profile))}


def _under(given: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in given.items():
        inner = merged.get(key)
        merged[key] = _under(value, inner) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged
