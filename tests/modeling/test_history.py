"""What past runs needed: where it is kept, and that keeping it never fails a run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llmkit.files import cache_folder
from llmkit.modeling import history
from llmkit.modeling.history import Record

RECORD = Record(
    at="2026-11-21T00:00:00+00:00", name="r", device="cpu", cpu=True, processes=1, sharding="none", kind="full bfloat16",
    parameters=10, predicted_host=110.0, measured_host=100.0, predicted_device=None, measured_device=None, base=50.0,
    flops=5.0, versions={"torch": "2"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LLMKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llmkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "llmkit"


def test_records_come_back_in_order() -> None:
    for number in range(3):
        history.append(replace(RECORD, parameters=number))
    assert [r.parameters for r in history.read()] == [0, 1, 2]
    assert history.read()[0] == replace(RECORD, parameters=0)


def test_lines_of_several_writers_do_not_mix() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: history.append(replace(RECORD, parameters=n)), range(100)))
    assert sorted(r.parameters for r in history.read()) == list(range(100))


def test_damaged_lines_are_passed_over(cache: Path) -> None:
    history.append(RECORD)
    with (cache / history.FILE).open("a") as file:
        file.write('{"at": 1}\nnot json\n[]\n{"half')
    assert history.read() == [RECORD]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_costs_nothing(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    history.append(RECORD)
    assert history.read() == []


def test_a_folder_that_cannot_be_made_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "file" / "cache"))
    history.append(RECORD)
    assert history.read() == []


def test_accuracy() -> None:
    assert history.accuracy([]) is None
    found = history.accuracy([RECORD, replace(RECORD, predicted_host=80.0)])
    assert found is not None
    assert (found.runs, round(found.mean, 6), round(found.highest, 6), round(found.lowest, 6)) == (2, 0.15, 0.1, -0.2)
    gpu = replace(RECORD, predicted_device=90.0, measured_device=100.0)
    assert round(gpu.error, 6) == -0.1


def test_speed_of_a_kind_of_run() -> None:
    records = [replace(RECORD, flops=f) for f in (1.0, 9.0, 3.0)] + [replace(RECORD, kind="lora bfloat16", flops=100.0)]
    assert history.reached(records, "full bfloat16", 10) == (3.0, 3)
    assert history.reached(records, "full bfloat16", 40) == (3.0, 3)
    assert history.reached(records, "full bfloat16", 41) is None  # a model of another size
    assert history.reached(records, "full float32", 10) is None
    assert history.of_device(records, "gpu") == []
