"""A site's launch settings under a recipe's, and their mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.errors import RecipeError, UsageError
from llmkit.recipe import load_recipe, parse
from llmkit.stages.sft import Recipe

REPO = Path(__file__).resolve().parent.parent
TEXT = "name: x\nmodel: {name_or_path: m}\ndata: {train: t}\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(TEXT + "launch: {nodes: 3, slurm: {mem: 8G}}\n")

    def to(text: str) -> None:
        Path("slurm").mkdir(exist_ok=True)
        Path("slurm/site.yaml").write_text(text)

    return to


def test_the_recipe_wins_key_by_key_and_the_command_line_over_both(site: Callable[[str], None]) -> None:
    site("launcher: slurm\nnodes: 2\nslurm: {partition: gpu, mem: 4G, time: '30'}\n")
    found = load_recipe("r.yaml", Recipe, ["launch.slurm.time='60'"], profile="site").launch
    assert (found.launcher, found.nodes) == ("slurm", 3)
    assert (found.slurm.partition, found.slurm.mem, found.slurm.time) == ("gpu", "8G", "60")
    assert (
        parse(
            {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "t"}}, Recipe, profile="slurm/site.yaml"
        ).launch.nodes
        == 2
    )


def test_its_mistakes_have_its_own_file_and_line(site: Callable[[str], None]) -> None:
    site("launcher: slurm\nslurm:\n  partitoin: gpu\n  nodes: 2\n")
    with pytest.raises(RecipeError) as error:
        load_recipe("r.yaml", Recipe, profile="site")
    said = str(error.value)
    assert "2 mistakes in the profile" in said
    assert "slurm/site.yaml:3:3: slurm.partitoin" in said
    assert "did you mean `partition`" in said
    assert "belongs at the top level" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [("siet", "Did you mean site?"), ("nosuch/file.yaml", "there is no such file"), ("other", "There are: site.")],
)
def test_one_that_is_not_there_is_told(site: Callable[[str], None], name: str, said: str) -> None:
    site("nodes: 2\n")
    with pytest.raises(UsageError, match=said):
        load_recipe("r.yaml", Recipe, profile=name)


def test_those_that_are_shipped_are_valid() -> None:
    files = sorted(REPO.glob("slurm/*.yaml"))
    assert files
    for path in files:
        assert (
            parse(
                {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "t"}}, Recipe, profile=str(path)
            ).launch.launcher
            == "slurm"
        )
