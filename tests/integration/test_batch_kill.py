"""A batch job killed with ``kill -9``, then the same command: the shards of a job that was never killed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
TOYS = REPO / "tests" / "toys"
pytestmark = [pytest.mark.integration, pytest.mark.server]


@pytest.fixture(scope="module")
def batch_kill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("batch_kill", REPO / "benchmarks" / "batch_kill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["batch_kill"] = module
    spec.loader.exec_module(module)
    return module


def test_killed_again_and_again_it_ends_as_if_it_never_was(
    batch_kill: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(TOYS)]))
    texts = [f"text {i % 23} of {i % 7}" if i % 11 else ("bad" if i % 2 else "long") for i in range(300)]
    for name, kills, pause in (("reference", 0, "0"), ("killed", 5, "0.1")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts))
        )
        monkeypatch.setenv("UPPER_PAUSE", pause)
        command = [sys.executable, str(TOYS / "upper_job.py"), str(folder)]
        done = batch_kill.play(command, folder / "out", kills, random.Random(3))
    assert len(done) >= 4
    assert len({kill.shards for kill in done}) >= 3
    for folder in (tmp_path / "reference", tmp_path / "killed"):
        for path in (folder / "out" / "errors.jsonl", folder / "out" / "dropped.jsonl"):
            path.write_text(path.read_text().replace(str(folder), ""))
    shards, differences = batch_kill.compare(tmp_path / "killed" / "out", tmp_path / "reference" / "out")
    assert differences == []
    assert shards == 30
    assert (tmp_path / "killed" / "out" / "dropped.jsonl").read_text().count("too long") == 14
