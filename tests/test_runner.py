"""The runner: whose folder it is, what is written, what happens when a stage ends badly."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkit import runner
from llmkit.context import Result, StopFlag
from llmkit.errors import DataError, GateError, MissingError, UsageError, WontFitError
from llmkit.recipe import Recipe, load_recipe, parse
from llmkit.stages import STAGES

TOYS = Path(__file__).parent / "toys"

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.setitem(STAGES, "toy", "toy_stage")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(**keys: Any) -> Recipe:
        from toy_stage import Recipe as Toy

        given = {"name": "toy", "output_dir": str(tmp_path / "out"), "tracking": {"enabled": False}}
        return parse(given | keys, Toy)

    return build


def result_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return data


def checkpoint(folder: Path, step: int) -> None:
    target = folder / "checkpoints" / f"checkpoint-{step}"
    target.mkdir(parents=True)
    (target / "step").write_text(str(step))


def test_a_run_leaves_recipe_run_and_result(make: Make, tmp_path: Path) -> None:
    result = runner.run(make(), "toy")
    folder = tmp_path / "out"
    assert result.status == "done"
    assert result.metrics["steps"] == 3
    assert result_of(folder)["exit_code"] == 0
    assert Result.from_json((folder / "result.json").read_text()) == result
    from toy_stage import Recipe as Toy

    assert load_recipe(folder / "recipe.yaml", Toy) == make()
    assert json.loads((folder / "run.json").read_text())["stage"] == "toy"
    assert (folder / "log.jsonl").is_file()


def test_result_is_written_last(make: Make, tmp_path: Path) -> None:
    runner.run(make(), "toy")
    folder = tmp_path / "out"
    written = (folder / "result.json").stat().st_mtime_ns
    assert written >= max(p.stat().st_mtime_ns for p in (folder / "model", folder / "recipe.yaml", folder / "run.json"))


def test_a_relative_folder_is_frozen_absolute(make: Make, tmp_path: Path) -> None:
    runner.run(make(output_dir="here"), "toy")
    assert f"output_dir: {tmp_path}/here" in (tmp_path / "here" / "recipe.yaml").read_text()


def test_done_run_is_not_run_again(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = runner.run(make(), "toy")
    (tmp_path / "out" / "seen-by-0").unlink()
    assert runner.run(make(), "toy") == first
    assert "nothing to do" in capsys.readouterr().err
    assert not (tmp_path / "out" / "seen-by-0").exists()


def test_keys_without_effect_may_change(make: Make) -> None:
    runner.run(make(), "toy")
    assert runner.look(make(tracking={"enabled": False, "experiment": "other"}), "toy").finding.state == "done"


def test_other_recipe_is_refused_with_the_keys(make: Make) -> None:
    runner.run(make(), "toy")
    with pytest.raises(UsageError, match=r"steps.*--output-dir.*--resume never") as caught:
        runner.run(make(steps=4), "toy")
    assert "tracking" not in str(caught.value)


def test_other_stage_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.run(make(), "toy")
    monkeypatch.setitem(STAGES, "toy2", "toy_stage")
    with pytest.raises(UsageError, match="its stage is toy, not toy2"):
        runner.run(make(), "toy2")


def test_resume_never_keeps_the_old_folders(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.run(make(), "toy")
    runner.run(make(steps=4), "toy", "never")
    runner.run(make(steps=5), "toy", "never")
    assert [result_of(tmp_path / n)["metrics"]["steps"] for n in ("out.1", "out.2", "out")] == [3, 4, 5]
    assert "out.2" in capsys.readouterr().err


def test_unfinished_run_goes_on(make: Make, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        runner.run(make(end="gate"), "toy")
    checkpoint(tmp_path / "out", 2)
    with pytest.raises(GateError):
        runner.run(make(end="gate"), "toy")
    assert runner.look(make(end="gate"), "toy").finding.state == "continue"
    with pytest.raises(UsageError, match="end differs"):
        runner.run(make(), "toy")


def test_resume_from_a_path_into_a_new_folder(make: Make, tmp_path: Path) -> None:
    checkpoint(tmp_path / "old", 2)
    result = runner.run(make(), "toy", str(tmp_path / "old" / "checkpoints" / "checkpoint-2"))
    assert result.metrics["started_at"] == 2
    with pytest.raises(UsageError, match="no such checkpoint"):
        runner.run(make(), "toy", "nowhere")
    with pytest.raises(UsageError, match="is finished"):
        runner.run(make(), "toy", str(tmp_path / "old" / "checkpoints" / "checkpoint-2"))


def test_a_failed_run_without_work_makes_way_for_another_recipe(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        runner.run(make(end="data", steps=0), "toy")
    (tmp_path / "out" / "seen-by-0").unlink()
    assert runner.run(make(), "toy").status == "done"
    assert result_of(tmp_path / "out.1")["status"] == "failed"


def test_a_foreign_folder_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for resume in ("auto", "never"):
        with pytest.raises(UsageError, match=r"thesis\.tex"):
            runner.run(make(), "toy", resume)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        runner.run(make(output_dir=str(tmp_path / "file")), "toy")
    with pytest.raises(UsageError, match="Cannot write to the output folder"):
        runner.run(make(output_dir=str(tmp_path / "file" / "below")), "toy")


def test_an_edited_frozen_recipe_is_refused(make: Make, tmp_path: Path) -> None:
    runner.run(make(), "toy")
    path = tmp_path / "out" / "recipe.yaml"
    path.write_text(path.read_text().replace("steps: 3", "steps: 5"))
    with pytest.raises(UsageError, match="was edited"):
        runner.run(make(steps=5), "toy")


def test_damaged_run_file(make: Make, tmp_path: Path) -> None:
    runner.run(make(), "toy")
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run\.json is damaged"):
        runner.run(make(), "toy")
    assert runner.run(make(), "toy", "never").status == "done"


def test_changed_data_is_noticed(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    recipe = make(data={"train": str(file)})
    runner.run(recipe, "toy")
    assert runner.run(recipe, "toy").status == "done"
    file.write_text('{"text": "b"}\n')
    with pytest.raises(UsageError, match=r"data changed.*rows\.jsonl.*--resume never"):
        runner.run(recipe, "toy")
    assert runner.run(recipe, "toy", "never").status == "done"


def test_missing_data_is_an_error_before_a_folder_is_made(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        runner.run(make(data={"train": str(tmp_path / "none.jsonl")}), "toy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("end", "kind", "code"),
    [
        ("data", DataError, 3), ("gate", GateError, 4), ("memory", WontFitError, 5),
        ("torch_memory", WontFitError, 5), ("disk", WontFitError, 5), ("missing", MissingError, 6),
        ("bug", json.JSONDecodeError, 1), ("interrupt", KeyboardInterrupt, 130),
    ],
)  # fmt: skip
def test_failures_are_recorded_and_the_next_start_is_normal(
    make: Make, tmp_path: Path, end: str, kind: type[BaseException], code: int
) -> None:
    with pytest.raises(kind):
        runner.run(make(end=end), "toy")
    result = result_of(tmp_path / "out")
    assert (result["status"], result["exit_code"]) == ("failed", code)
    assert result["error"]
    assert (tmp_path / "out" / "traceback.txt").is_file() == (end == "bug")
    with pytest.raises(kind):  # not "nothing to do", and the lock is free
        runner.run(make(end=end), "toy")


def test_no_secret_of_a_message_reaches_the_result(make: Make, tmp_path: Path) -> None:
    """[34]"""
    with pytest.raises(MissingError):
        runner.run(make(end="secret"), "toy")
    text = (tmp_path / "out" / "result.json").read_text()
    assert "s3cr3tpw" not in text
    assert "https://***@host/rows.jsonl cannot be reached" in text


def test_signal_handlers_are_restored_and_left_alone_in_threads() -> None:
    before = [signal.getsignal(s) for s in runner.SIGNALS]
    stop = StopFlag()
    with runner.listening(stop):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
        assert stop.reason == "SIGUSR1"
    assert [signal.getsignal(s) for s in runner.SIGNALS] == before
    seen: list[Any] = []

    def in_thread() -> None:
        with runner.listening(StopFlag()):
            seen.extend(signal.getsignal(s) for s in runner.SIGNALS)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == before


def test_wrong_rank_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="not below WORLD_SIZE"):
        runner.run(make(), "toy")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UsageError, match="whole numbers"):
        runner.run(make(), "toy")


def test_seeds_reach_python_numpy_and_torch() -> None:
    import random

    import numpy as np
    import torch

    def draw() -> tuple[float, float, float]:
        runner.seed(7)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw() == draw()


def test_flat_recipe_has_dotted_keys(make: Make) -> None:
    flat = runner.flat(make())
    assert flat["tracking.enabled"] is False
    assert flat["steps"] == 3
    assert not any(isinstance(v, dict) and v for v in flat.values())


def test_write_atomic_leaves_the_old_file_on_failure(tmp_path: Path) -> None:
    from llmkit.rundir import write_atomic

    path = tmp_path / "x.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
