"""The command line: what is loaded, what is said where, and the exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOYS = Path(__file__).parent / "toys"
HEAVY = {
    "accelerate", "datasets", "deepspeed", "matplotlib", "mlflow", "numpy", "pandas", "peft", "pyarrow", "torch",
    "transformers", "trl",
}  # fmt: skip

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The command line with the toy stage beside the real ones, in a process of its own."""

    def run(*args: object, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(TOYS / "toy_cli.py"), *map(str, args)],
            cwd=tmp_path, input=stdin, capture_output=True, text=True, timeout=120, check=False,
            env=os.environ | {"COLUMNS": "120"} | (env or {}),
        )  # fmt: skip

    return run


@pytest.fixture
def toy_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: toy\noutput_dir: out\ntracking: {enabled: false}\n")
    return path


@pytest.fixture
def sft_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "sft.yaml"
    path.write_text("name: t\nmodel: {name_or_path: some/model}\ndata: {train: none.jsonl}\n")
    return path


def loaded(arguments: list[str], tmp_path: Path) -> tuple[set[str], int]:
    """Modules in memory after ``llmkit <arguments>``, and the exit code."""
    code = (
        "import json, sys\nfrom llmkit.cli import main\n"
        f"code = main({arguments!r})\n"
        "open('modules.json', 'w').write(json.dumps([code, sorted(sys.modules)]))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    exit_code, modules = json.loads((tmp_path / "modules.json").read_text())
    return {m.partition(".")[0] for m in modules}, exit_code


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0), (["--version"], 0), (["sft", "--help"], 0), (["stf"], 2),
        (["sft", "sft.yaml", "--dry-run"], 0), (["sft", "sft.yaml", "train.max_stepps=1"], 2),
        (["lora", "sft.yaml", "adapter.r=4", "--dry-run", "--json"], 0), (["sft", "sft.yaml"], 3),
        (["init", "sft"], 0), (["export-schema"], 0),
    ],
)  # fmt: skip
def test_nothing_heavy_is_loaded(arguments: list[str], code: int, sft_recipe: Path, tmp_path: Path) -> None:
    modules, exit_code = loaded(arguments, tmp_path)
    assert exit_code == code
    assert modules & HEAVY == set()


def test_help_needs_neither_pydantic_nor_rich(tmp_path: Path) -> None:
    modules, _ = loaded(["--help"], tmp_path)
    assert modules & {"pydantic", "yaml", "rich", "jinja2"} == set()


def test_help_shows_every_stage_with_its_example(cli: Cli) -> None:
    text = cli("--help").stdout
    from llmkit.stages import STAGES

    for stage in [*STAGES, "toy", "run", "init", "doctor", "export-schema", "chat", "merge", "sync"]:
        assert f"\n  {stage} " in text
        page = cli(stage, "--help")
        assert page.returncode == 0
        assert f"llmkit {stage} " in page.stdout or stage == "doctor"
    assert "138" in text


def test_version(cli: Cli) -> None:
    import llmkit

    assert cli("--version").stdout == f"llmkit {llmkit.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["lroa", "r.yaml"], "Did you mean 'lora'?"), (["sft"], "Missing argument 'RECIPE'"),
        (["toy", "recipe.yaml", "--bogus"], "--bogus"), (["toy", "recipe.yaml", "--launcher", "lokal"], "Did you mean local?"),
        (["toy", "recipe.yaml", "steps"], "not KEY=VALUE"), (["toy", "recipe.yaml", "stepps=3"], "did you mean `steps`"),
        (["toy", "none.yaml"], "none.yaml"), (["toy", "recipe.yaml", "--resume", "nowhere"], "no such checkpoint"),
        (["run", "recipe.yaml"], "is not the recipe of a run"), (["run", "none.yaml"], "There is no file none.yaml"),
        (["init", "sfft"], "Did you mean sft?"), (["export-schema", "sfft"], "Did you mean sft?"),
    ],
)  # fmt: skip
def test_usage_mistakes_end_with_2_and_no_traceback(cli: Cli, toy_recipe: Path, args: list[str], said: str) -> None:
    done = cli(*args)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("done", 0, "run folder:"), ("bug", 1, "a bug in llmkit: JSONDecodeError"), ("data", 3, "rows 1, 2 and 3"),
        ("gate", 4, "above the bound"), ("memory", 5, "Out of memory"), ("disk", 5, "The disk is full"),
        ("missing", 6, "pip install 'llmkit[presidio]'"), ("interrupt", 130, "interrupted"),
    ],
)  # fmt: skip
def test_exit_codes(cli: Cli, toy_recipe: Path, tmp_path: Path, end: str, code: int, said: str) -> None:
    """[26]: a failure never ends with 0."""
    done = cli("toy", toy_recipe, f"end={end}")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["exit_code"] == code


def test_a_bug_keeps_its_traceback_and_debug_shows_it(cli: Cli, toy_recipe: Path, tmp_path: Path) -> None:
    done = cli("toy", toy_recipe, "end=bug")
    assert str(tmp_path / "out" / "traceback.txt") in done.stderr
    assert "the secret" not in done.stderr
    assert "_end(recipe.end, ctx)" in (tmp_path / "out" / "traceback.txt").read_text()
    assert "Traceback" in cli("toy", toy_recipe, "end=bug", "--debug").stderr


def test_json_is_the_only_thing_on_stdout(cli: Cli, toy_recipe: Path) -> None:
    done = cli("toy", toy_recipe, "--json")
    assert done.returncode == 0
    data = json.loads(done.stdout)
    assert (data["status"], data["exit_code"], data["metrics"]["steps"]) == ("done", 0, 3)
    assert "a library prints to stdout" in done.stderr
    assert "a child process prints to stdout" in done.stderr


@pytest.mark.parametrize(
    ("args", "code"),
    [(["end=gate"], 4), (["end=bug"], 1), (["stepps=1"], 2), (["--bogus"], 2), (["end=interrupt"], 130)],
)
def test_json_of_a_failure(cli: Cli, toy_recipe: Path, args: list[str], code: int) -> None:
    done = cli("toy", toy_recipe, "--json", *args)
    data = json.loads(done.stdout)
    assert done.returncode == data["exit_code"] == code
    assert data["error"] in done.stderr


def test_json_of_nonsense_arguments(cli: Cli) -> None:
    assert json.loads(cli("stf", "--json").stdout)["exit_code"] == 2


def test_summary_on_stderr(cli: Cli, toy_recipe: Path) -> None:
    text = cli("toy", toy_recipe).stderr
    for part in ("toy toy: done", "reference: r", "before: b", "after: a", "run folder:  out", "llmkit chat out"):
        assert part in text


def test_dry_run_prints_the_recipe_and_makes_nothing(cli: Cli, toy_recipe: Path, tmp_path: Path) -> None:
    import yaml

    done = cli("toy", toy_recipe, "steps=9", "--set", "seed=5", "--output-dir", "my runs/1", "--dry-run")
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load(done.stdout)
    assert (recipe["steps"], recipe["seed"], recipe["output_dir"]) == (9, 5, str(tmp_path / "my runs" / "1"))
    assert f"llmkit run '{tmp_path}/my runs/1/recipe.yaml'" in done.stderr
    assert "from the start" in done.stderr
    assert not (tmp_path / "my runs").exists()
    as_json = json.loads(cli("toy", toy_recipe, "--dry-run", "--json").stdout)
    assert as_json["dry_run"] is True
    assert as_json["recipe"]["steps"] == 3


def test_dry_run_names_the_resume_point(cli: Cli, toy_recipe: Path, tmp_path: Path) -> None:
    assert cli("toy", toy_recipe, "end=gate").returncode == 4
    (tmp_path / "out" / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    assert "checkpoint-20" in cli("toy", toy_recipe, "end=gate", "--dry-run").stderr


def test_output_dir_that_looks_like_a_number_stays_text(cli: Cli, toy_recipe: Path, tmp_path: Path) -> None:
    assert cli("toy", toy_recipe, "--output-dir", "2024").returncode == 0
    assert (tmp_path / "2024" / "result.json").is_file()


def test_run_works_in_its_own_folder_even_when_moved(cli: Cli, toy_recipe: Path, tmp_path: Path) -> None:
    assert cli("toy", toy_recipe, "end=gate").returncode == 4
    (tmp_path / "out").rename(tmp_path / "moved")
    again = cli("run", tmp_path / "moved" / "recipe.yaml")
    assert again.returncode == 4
    assert "Going on" in again.stderr
    assert not (tmp_path / "out").exists()
    assert cli("run", tmp_path / "moved", "--dry-run").returncode == 0


def test_finished_run_says_so_and_gives_the_old_result(cli: Cli, toy_recipe: Path) -> None:
    first = json.loads(cli("toy", toy_recipe, "--json").stdout)
    done = cli("toy", toy_recipe, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == first
    assert f"finished on {first['finished_at']}, nothing to do" in done.stderr
    assert cli("run", "out/recipe.yaml").returncode == 0
    assert cli("toy", toy_recipe, "steps=4").returncode == 2


def test_init_writes_a_recipe_that_parses_and_never_overwrites(cli: Cli, tmp_path: Path) -> None:
    from llmkit.stages import STAGES

    for stage in STAGES:
        assert cli("init", stage, "--output", f"{stage}.yaml").returncode == 0
        assert cli(stage, f"{stage}.yaml", "--dry-run").returncode == 0
        assert (tmp_path / f"{stage}.yaml").read_text() == cli("init", stage).stdout
        assert cli("init", stage, "--output", f"{stage}.yaml").returncode == 2
    assert cli("init", "sft", "--output", "no/such/folder.yaml").returncode == 2


def test_export_schema(cli: Cli) -> None:
    one: dict[str, Any] = json.loads(cli("export-schema", "lora").stdout)
    assert "adapter" in one["properties"]
    every = json.loads(cli("export-schema").stdout)
    assert {"sft", "lora", "cpt"} <= every.keys()


def test_merge_and_sync_of_no_folder(cli: Cli) -> None:
    for command in ("merge", "sync"):
        done = cli(command, "nowhere")
        assert done.returncode == 6
        assert "There is no run folder nowhere" in done.stderr


def test_a_reader_that_leaves_is_no_error(toy_recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m llmkit export-schema | head -c 10", shell=True, cwd=tmp_path, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_console_script_is_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("llmkit")
    if not script.exists():
        pytest.fail("the console script llmkit is not installed: pip install -e .")
    done = subprocess.run([script, "stf"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
