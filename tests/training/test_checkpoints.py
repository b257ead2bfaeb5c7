"""[15], [17]: a checkpoint is complete or invisible, and goes on only with the run that it is of."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.training import checkpoints
from llmkit.training.checkpoints import MANIFEST, Manifest
from llmkit.training.trainer import clear_leftovers

RUN = Manifest(step=0, world_size=1, batch=8, data="abc")


def publish(folder: Path, step: int, manifest: Manifest = RUN, text: str = "weights") -> Path:
    work = checkpoints.staging(folder, step)
    (work / "model.safetensors").write_text(text)
    (work / "deep").mkdir()
    (work / "deep" / "state.pt").write_bytes(b"\0" * 100)
    return checkpoints.publish(work, folder, Manifest(step, manifest.world_size, manifest.batch, manifest.data))


def test_a_published_checkpoint_is_complete(tmp_path: Path) -> None:
    made = publish(tmp_path, 5)
    assert made == tmp_path / "checkpoint-5"
    assert checkpoints.problem(made) is None
    assert checkpoints.last_complete(tmp_path) == (made, [])
    manifest = Manifest.read(made)
    assert (manifest.step, manifest.files) == (5, {"model.safetensors": 7, "deep/state.pt": 100})
    assert list(tmp_path.iterdir()) == [made]


def test_what_is_being_written_is_invisible(tmp_path: Path) -> None:
    older = publish(tmp_path, 5)
    work = checkpoints.staging(tmp_path, 10)
    (work / "model.safetensors").write_text("half")
    assert checkpoints.last_complete(tmp_path) == (older, [])
    assert checkpoints.newest_first(tmp_path) == [older]
    again = checkpoints.staging(tmp_path, 10)
    assert list(again.iterdir()) == [], "what an earlier attempt left was taken over"


def test_killed_at_any_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file operation is the last one, there is a complete checkpoint, and it is the old or the new one."""
    calls = 0
    limit = 0

    class KilledError(BaseException):
        pass

    real = {"_flush": checkpoints.flush, "rename": Path.rename, "rmtree": shutil.rmtree}

    def stop(name: str) -> object:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KilledError
            return real[name](*args, **kwargs)

        return wrapped

    outcomes = []
    for limit in range(12):
        folder = tmp_path / str(limit)
        publish(folder, 5, text="old")
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "flush", stop("_flush"))
            patch.setattr(Path, "rename", stop("rename"))
            patch.setattr(shutil, "rmtree", stop("rmtree"))
            try:
                publish(folder, 10, text="new")
                checkpoints.rotate(folder, 1, None)
                outcomes.append("done")
            except KilledError:
                outcomes.append("killed")
        last, _ = checkpoints.last_complete(folder)
        assert last is not None, f"killed after {limit} operations, no checkpoint is left"
        assert (last / "model.safetensors").read_text() == {"checkpoint-5": "old", "checkpoint-10": "new"}[last.name]
        clear_leftovers(folder)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        assert checkpoints.last_complete(folder)[0] == last
    assert "killed" in outcomes and outcomes[-1] == "done"


def break_file(folder: Path, how: str) -> str:
    """Damage a checkpoint; what the reason must say."""
    if how == "truncated":
        (folder / "deep" / "state.pt").write_bytes(b"\0" * 60)
        return r"deep/state\.pt has 60 bytes instead of 100"
    if how == "missing":
        (folder / "model.safetensors").unlink()
        return r"model\.safetensors is missing"
    if how == "no manifest":
        (folder / MANIFEST).unlink()
        return "no complete manifest"
    if how == "empty manifest":
        (folder / MANIFEST).write_text("")
        return "no complete manifest"
    (folder / MANIFEST).write_text(json.dumps({"step": 3, "strange": 1}))
    return "no complete manifest"


DAMAGES = ["truncated", "missing", "no manifest", "empty manifest", "other manifest"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_passed_over_with_the_reason(how: str, tmp_path: Path) -> None:
    good, bad = publish(tmp_path, 5), publish(tmp_path, 10)
    reason = break_file(bad, how)
    assert re.search(reason, checkpoints.problem(bad) or "")
    found, lines = checkpoints.last_complete(tmp_path)
    assert found == good
    assert len(lines) == 1
    assert re.match(rf"checkpoint-10 is not complete \(.*{reason}.*\) and is passed over", lines[0])


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', '{"step": 1}', '{"files": [1]}', "{", "\xff"])
def test_a_manifest_of_another_shape_is_no_manifest(text: str, tmp_path: Path) -> None:
    folder = publish(tmp_path, 5)
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    assert checkpoints.problem(folder) == "it has no complete manifest"


def test_no_checkpoint_is_complete(tmp_path: Path) -> None:
    assert checkpoints.last_complete(tmp_path / "none") == (None, [])
    break_file(publish(tmp_path, 5), "missing")
    found, lines = checkpoints.last_complete(tmp_path)
    assert found is None and len(lines) == 1


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    break_file(publish(tmp_path, 5), "truncated")
    made = publish(tmp_path, 5, text="new")
    assert checkpoints.problem(made) is None
    assert (made / "model.safetensors").read_text() == "new"


def test_newest_is_by_number_and_other_names_are_not_looked_at(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        publish(tmp_path, step)
    (tmp_path / "checkpoint-7x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [p.name for p in checkpoints.newest_first(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=7, unique=True),
    keep=st.none() | st.integers(0, 4),
    best=st.none() | st.integers(0, 6),
)
def test_rotation_keeps_the_newest_and_the_best(
    steps: list[int], keep: int | None, best: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rotate")
    for step in steps:
        publish(folder, step)
    chosen = folder / f"checkpoint-{steps[best % len(steps)]}" if best is not None else None
    checkpoints.rotate(folder, keep, chosen)
    left = {int(p.name.split("-")[1]) for p in checkpoints.newest_first(folder)}
    newest = set(sorted(steps)[-max(keep, 1) :]) if keep is not None else set(steps)
    assert left == newest | ({steps[best % len(steps)]} if best is not None else set())


def test_rotation_does_not_count_damaged_ones(tmp_path: Path) -> None:
    publish(tmp_path, 5)
    publish(tmp_path, 10)
    break_file(publish(tmp_path, 15), "truncated")
    checkpoints.rotate(tmp_path, 1, None)
    assert checkpoints.last_complete(tmp_path)[0] == tmp_path / "checkpoint-10"


def test_the_same_run_fits(tmp_path: Path) -> None:
    checkpoints.check_fits(publish(tmp_path, 5), Manifest(0, 1, 8, "abc"))


def test_other_data_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path, 5)
    with pytest.raises(UsageError, match=r"other data or another packing of it \(abc, now xyz\)") as caught:
        checkpoints.check_fits(folder, Manifest(0, 1, 8, "xyz"))
    assert str(folder) in str(caught.value)
    assert "--resume never" in str(caught.value)


@pytest.mark.parametrize(("world_size", "batch"), [(2, 8), (1, 16), (2, 16)])
def test_another_number_of_processes_is_refused_with_the_reason(world_size: int, batch: int, tmp_path: Path) -> None:
    folder = publish(tmp_path, 5)
    with pytest.raises(UsageError, match=r"written by 1 process\(es\) with 8 sequences a step") as caught:
        checkpoints.check_fits(folder, Manifest(0, world_size, batch, "abc"))
    assert f"this run has {world_size} process(es) with {batch}" in str(caught.value)
    assert "random state" in str(caught.value)


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    kept = publish(tmp_path, 5)
    checkpoints.staging(tmp_path, 10)
    (tmp_path / ".checkpoint-3.removed").mkdir()
    (tmp_path / ".checkpoint-3.removed" / "x").write_text("x")
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
