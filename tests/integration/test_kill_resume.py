"""[15], [16]: ``kill -9`` at seeded moments, then the same command; the benchmark of the same name does it at length."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kill_resume() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_resume", REPO / "benchmarks" / "kill_resume.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_resume"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_four_times_the_run_ends_as_if_it_never_was(
    kill_resume: ModuleType, tiny_llama: Path, tmp_path: Path
) -> None:
    """In data preparation, in a step, during a save, during the export."""
    rows = kill_resume.write_rows(tmp_path / "rows.jsonl", 1500)
    setting = kill_resume.Setting(tiny_llama, rows, steps=24, save_steps=3)
    draw = random.Random(7)
    kill_resume.play(setting, tmp_path / "reference", [], draw)
    moments = ["data preparation", "step", "save", "export"]
    done = kill_resume.play(setting, tmp_path / "killed", moments, draw)
    hits = [kill.hit for kill in done.kills]
    assert len(hits) >= 3 and done.starts == len(hits) + 1, hits
    assert len({hit.split(" (")[0] for hit in hits}) >= 3, hits
    compared, differences = kill_resume.compare(tmp_path / "killed" / "out", tmp_path / "reference" / "out")
    assert compared > 50
    assert differences == [], hits
