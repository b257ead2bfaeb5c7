"""A slice of benchmarks/fuzz_data.py: damaged files end in a DataError or in a report that adds up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_data.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    sys.path.append(str(SCRIPT.parent))  # where the benchmarks find what they share
    spec = importlib.util.spec_from_file_location("fuzz_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sixty_damaged_files_raise_nothing_but_data_errors(fuzz: ModuleType, tmp_path: Path) -> None:
    tokenizer = fuzz.tokenizer()
    outcomes = []
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        _, settings, _ = fuzz.make_case(folder, number, seed=7)
        outcomes.append(fuzz.check(settings, folder, tokenizer))
    assert set(outcomes) == {"done", "data error"}
    assert outcomes.count("done") >= 5
