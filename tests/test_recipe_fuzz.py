"""A slice of benchmarks/fuzz_recipes.py: damaged recipes are read or refused in words, never with a traceback."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "benchmarks" / "fuzz_recipes.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_recipes", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_recipes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_200_damaged_recipes_are_read_or_refused_in_words(fuzz: ModuleType, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    fuzz.explore(200, 1, lambda case: seen.update([fuzz.outcome(case, tmp_path / "recipe.yaml")]))
    assert sum(seen.values()) >= 200
    assert seen["refused"] > 100
    assert seen["valid"] > 1


def test_the_undamaged_recipe_is_valid(fuzz: ModuleType, tmp_path: Path) -> None:
    assert fuzz.outcome(fuzz.Case("text", fuzz.VALID.encode()), tmp_path / "recipe.yaml") == "valid"
