"""The local launcher."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from llmkit import launch
from llmkit.errors import UsageError
from llmkit.launch import local
from llmkit.launch.job import Job, Resources


def job(tmp_path: Path, **changes: object) -> Job:
    keys = {"argv": ("llmkit", "run", str(tmp_path / "a b" / "recipe.yaml")), "output_dir": tmp_path, "cwd": tmp_path}
    return Job(**(keys | changes))  # type: ignore[arg-type]


def test_render_is_quoted_for_a_shell(tmp_path: Path) -> None:
    text = local.render(job(tmp_path, env={"X": "it's; rm -rf"}))
    assert shlex.split(text) == ["X=it's; rm -rf", "llmkit", "run", f"{tmp_path}/a b/recipe.yaml"]


def test_submit_gives_back_what_the_run_gives(tmp_path: Path) -> None:
    assert local.submit(job(tmp_path), lambda: 7) == 7


def test_submit_refuses_several_processes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 2 -m llmkit run"):
        local.submit(job(tmp_path, resources=Resources(processes_per_node=2)), lambda: 7)


def test_every_launcher_has_its_functions() -> None:
    for name in launch.LAUNCHERS:
        module = launch.load(name)
        assert callable(module.render)
        assert callable(module.submit)
