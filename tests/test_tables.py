"""Every table against the files beside it, and the floors of the house: what imports what, and when."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmkit import stages
from llmkit.data.settings import Format
from llmkit.errors import LlmkitError
from llmkit.recipe import Recipe

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "llmkit"
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = set(PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"])


def modules_in(folder: str) -> set[str]:
    return {path.stem for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded after ``code``."""
    listing = f"{code}\nimport sys; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, cwd=REPO)
    return set(done.stdout.split())


# --- tables ---------------------------------------------------------------------------------------------------------


def test_every_stage_has_a_line_in_the_table_and_the_shape_of_a_stage() -> None:
    assert {name.replace("_", "-"): f"llmkit.stages.{name}" for name in modules_in("stages")} == stages.STAGES
    assert len(stages.STAGES) >= 3
    for name in stages.STAGES:
        module = stages.load(name)
        assert issubclass(module.Recipe, Recipe), name
        assert callable(module.run), name
        assert f"llmkit {name}" in (module.__doc__ or ""), f"the first line of stages/{name}.py says how to run it"


def test_every_launcher_has_a_line_in_the_table() -> None:
    from llmkit import launch
    from llmkit.launch_settings import LauncherName

    assert modules_in("launch") - {"job", "record", "remote", "tail"} == set(launch.LAUNCHERS)
    assert set(get_args(LauncherName)) == set(launch.LAUNCHERS)
    for target in launch.LAUNCHERS.values():
        assert importlib.import_module(target) is not None


def test_every_data_format_has_a_function() -> None:
    from llmkit.data import formats

    assert set(get_args(Format)) - {"auto"} == set(formats.FORMATS)


def test_exit_codes_are_distinct_and_documented() -> None:
    import llmkit.errors as errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, LlmkitError)]
    codes = {k.exit_code for k in kinds}
    assert codes == {1, 2, 3, 4, 5, 6, 138}
    page = (REPO / "docs/decisions/exit-codes.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes | {0}


def test_every_settings_field_has_a_docstring() -> None:
    from llmkit.recipe import Settings

    seen: set[type] = set()

    def visit(kind: type[Settings]) -> None:
        if kind in seen:
            return
        seen.add(kind)
        for name, field in kind.model_fields.items():
            if kind.__module__.startswith("llmkit"):
                assert field.description, f"{kind.__name__}.{name} has no docstring"
            for part in [field.annotation, *get_args(field.annotation)]:
                if isinstance(part, type) and issubclass(part, Settings):
                    visit(part)

    for name in stages.STAGES:
        visit(stages.load(name).Recipe)
    assert len(seen) >= 6


# --- floors ---------------------------------------------------------------------------------------------------------


def test_imports_only_point_down() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=REPO,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


SETTINGS = sorted(".".join(p.relative_to(REPO).with_suffix("").parts) for p in PACKAGE.glob("*/settings.py"))


def test_settings_load_nothing_heavy() -> None:
    assert len(SETTINGS) >= 3
    code = "\n".join(
        f"import {name}" for name in [*SETTINGS, *stages.STAGES.values(), "llmkit.runner", "llmkit.launch.job"]
    )
    assert loaded_by(code) & HEAVY == set()


@pytest.mark.parametrize("folder", ["", "stages", "launch"])
def test_light_modules_import_nothing_heavy_at_their_top(folder: str) -> None:
    files = sorted((PACKAGE / folder).glob("*.py"))
    assert len(files) >= 2
    for path in files:
        top = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} & HEAVY == set(), path


# --- versions -------------------------------------------------------------------------------------------------------


def constraints() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert len(pins) > 100
    return pins


def test_constraints_are_exact_public_and_within_the_bounds() -> None:
    pins, project = constraints(), PROJECT["project"]
    extras = ("train", "guard", "s3", "demo", "dev", "bench")
    needs = [*project["dependencies"], *(line for e in extras for line in project["optional-dependencies"][e])]
    for need in map(Requirement, needs):
        version = pins[canonicalize_name(need.name)]
        assert need.specifier.contains(version), f"{need} but constraints.txt has {version}"
    for name, version in pins.items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}: no local label, no address"


def test_torch_is_one_version_everywhere() -> None:
    version = constraints()["torch"]
    for file in ("scripts/setup.sh", "docs/getting-started.md", "scripts/lock.py", "constraints.txt"):
        text = (REPO / file).read_text(encoding="utf-8")
        found = set(re.findall(r"(?:torch==|TORCH_VERSION=)([0-9.]+[0-9])", text))
        assert found == {version}, file


def test_transformers_is_where_vllm_can_live_beside_it() -> None:
    major, minor, patch = map(int, constraints()["transformers"].split("."))
    assert (5, 16, 1) <= (major, minor, patch) < (5, 20, 0)
