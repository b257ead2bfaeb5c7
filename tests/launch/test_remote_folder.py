"""A job whose run folder is in an object store: what is submitted names the URI, and nothing of the submitter's scratch folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit import runner
from llmkit.launch import record as records
from llmkit.launch import remote, slurm
from llmkit.recipe import parse
from llmkit.stages.check_data import Recipe

URI = "s3://bucket/runs/it's $(mine)"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("LLMKIT_SCRATCH", str(tmp_path / "scratch"))
    return parse(
        {"name": "x", "output_dir": URI, "model": {"name_or_path": "m"}, "data": {"train": "rows.jsonl"}}, Recipe
    )


def test_the_job_runs_the_recipe_in_the_store_and_logs_where_the_node_sees_it(recipe: Recipe, tmp_path: Path) -> None:
    job = remote.job_of([recipe], "check-data", "slurm", token="t")
    assert job.argv[2] == f"{URI}/recipe.yaml" and job.remote
    assert job.output_dir == runner.folder_of(recipe) and job.output_dir.is_relative_to(tmp_path / "scratch")
    assert job.logs.is_relative_to(Path.cwd())
    script = slurm.render(job, recipe.launch)
    assert "recipe='s3://bucket/runs/it'\"'\"'s $(mine)/recipe.yaml'" in script
    assert str(tmp_path / "scratch") not in script


def test_a_sweep_names_the_recipes_of_its_runs(recipe: Recipe) -> None:
    runs = [recipe.model_copy(update={"output_dir": f"s3://bucket/sweep/{i}"}) for i in range(2)]
    job = remote.job_of(runs, "check-data", "slurm")
    assert job.sweep == ("s3://bucket/sweep/0/recipe.yaml", "s3://bucket/sweep/1/recipe.yaml")


def test_a_uri_finds_the_record_in_this_machines_scratch_folder(recipe: Recipe) -> None:
    folder = runner.folder_of(recipe)
    folder.mkdir(parents=True)
    records.Record("slurm", "t", "x", "check-data", folder, records.now(), id="7", uri=URI).write()
    assert records.resolve(URI, Path("runs")).id == "7"
