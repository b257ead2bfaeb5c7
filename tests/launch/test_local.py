"""The local launcher: how many processes, and what it would run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import ClassVar

import pytest

from llmkit import launch
from llmkit.errors import RecipeError, UsageError
from llmkit.launch import local
from llmkit.launch.job import Job, Resources
from llmkit.processes import limits
from llmkit.recipe import Recipe, parse


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


class Training(Recipe):
    several_processes: ClassVar[bool] = True


def recipe(kind: type[Recipe] = Training, **launch: object) -> Recipe:
    return parse({"name": "a", "launch": launch}, kind)


def job(tmp_path: Path, **changes: object) -> Job:
    keys = {"argv": ("llmkit", "run", str(tmp_path / "a b" / "recipe.yaml")), "output_dir": tmp_path, "cwd": tmp_path}
    return Job(**(keys | changes))  # type: ignore[arg-type]


def test_render_is_quoted_for_a_shell(tmp_path: Path) -> None:
    text = local.render(job(tmp_path, env={"X": "it's; rm -rf"}))
    assert shlex.split(text) == ["X=it's; rm -rf", "llmkit", "run", f"{tmp_path}/a b/recipe.yaml"]


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.resources(recipe(processes=3)) == Resources(processes_per_node=3)
    for devices, processes in ((0, 1), (1, 1), (8, 8)):
        monkeypatch.setattr(limits, "visible_devices", lambda devices=devices: devices)
        assert local.resources(recipe()) == Resources(processes_per_node=processes)


def test_a_stage_that_cannot_be_divided_runs_as_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "visible_devices", lambda: 8)
    assert local.resources(recipe(Recipe)) == Resources()
    with pytest.raises(RecipeError, match="this stage runs as one process"):
        recipe(Recipe, processes=2)


def test_a_process_that_is_a_rank_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert local.resources(recipe(processes=2)) == Resources()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert local.resources(recipe(processes=2)) == local.resources(recipe()) == Resources()
    with pytest.raises(UsageError, match=r"launch\.processes is 3, but this is one of 2 processes"):
        local.resources(recipe(processes=3))


def test_the_cores_are_divided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(limits, "cores", lambda: 7)
    two = job(tmp_path, resources=Resources(processes_per_node=2))
    assert local.describe(two) == "2 on this machine, 3 threads each (OMP_NUM_THREADS)"
    monkeypatch.setattr(limits, "cores", lambda: 1)
    assert local.describe(two) == "2 on this machine, 1 thread each (OMP_NUM_THREADS)"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "5 threads" in local.describe(two)
    assert local.describe(job(tmp_path)) == "1"


def test_every_launcher_has_its_functions() -> None:
    for name in launch.LAUNCHERS:
        module = launch.load(name)
        for function in (module.resources, module.render, module.describe, module.submit):
            assert callable(function)
