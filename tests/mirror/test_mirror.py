"""Scratch folder and store, kept alike: what is uploaded when, what counts as complete, who is believed."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmkit import mirror
from llmkit.errors import DataError, StoppedEarly, StoreError, UsageError
from llmkit.mirror import Mirror, hold
from llmkit.mirror.hold import LEASE, Claim
from llmkit.mirror.store import Store
from llmkit.mirror.units import Contents, marker_of
from llmkit.ranks import Nodes
from llmkit.training import checkpoints
from llmkit.training.checkpoints import Manifest


class Run:
    """A run folder in memory, and machines that work in it."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"memory://{uuid.uuid4().hex}/runs/mine"
        self.store = Store(self.uri, patience_s=0)
        self.folder = folder
        self.notes: list[str] = []

    def machine(self, name: str) -> Path:
        folder = self.folder / name / "mine-0"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def on(self, machine: str, patience_s: float = 0.0, **nodes: Any) -> Iterator[Mirror]:
        with mirror.held(
            self.uri, self.machine(machine), self.notes.append, self.notes.append, Nodes(**nodes), patience_s
        ) as held:
            yield held

    @property
    def units(self) -> set[str]:
        return set(Contents.of(self.store).units)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(hold, "_SETTLE_S", 0.0)
    monkeypatch.setattr(hold, "_LOOK_S", 0.02)
    monkeypatch.setattr(hold, "LAPSE_S", 0.2)
    monkeypatch.setattr("llmkit.mirror.uploads._FIRST_PAUSE_S", 0.02)
    return Run(tmp_path)


def checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    work = checkpoints.staging(folder / "checkpoints", step)
    (work / "model.safetensors").write_text(f"{text} {step}", encoding="utf-8")
    return checkpoints.publish(work, folder / "checkpoints", Manifest(step, 1, 1, "data"))


def state(folder: Path, **files: str) -> None:
    for name, text in {"recipe.yaml": "name: x\n", "run.json": "{}", "log.jsonl": "{}\n", **files}.items():
        (folder / name.replace("_json", ".json")).write_text(text, encoding="utf-8")


def done(folder: Path) -> None:
    (folder / "result.json").write_text(json.dumps({"status": "done"}), encoding="utf-8")


class Faults:
    """Makes the store fail for objects whose name holds ``part``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.part = ""
        self.written: list[str] = []
        real_upload, real_write = Store.upload, Store.write

        def upload(store: Store, local: Path, name: str) -> None:
            self._maybe(store, name)
            real_upload(store, local, name)

        def write(store: Store, name: str, data: bytes) -> None:
            if name != LEASE:
                self._maybe(store, name)
            real_write(store, name, data)

        monkeypatch.setattr(Store, "upload", upload)
        monkeypatch.setattr(Store, "write", write)

    def _maybe(self, store: Store, name: str) -> None:
        if self.part and self.part in name:
            raise StoreError(f"The store of {store.uri} does not answer.", passing=True)
        self.written.append(name)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def test_files_come_before_their_marker_and_the_result_last(run: Run, faults: Faults) -> None:
    with run.on("a") as held:
        state(held.folder)
        held.begin(done=False)
        held.publish(checkpoint(held.folder, 3))
        (held.folder / "model").mkdir()
        (held.folder / "model" / "config.json").write_text("{}", encoding="utf-8")
        done(held.folder)
    order = faults.written
    assert order[-1] == "result.json"
    for unit, file in (("checkpoints/checkpoint-3", "model.safetensors"), ("model", "config.json")):
        assert order.index(f"{unit}/{file}") < order.index(marker_of(unit)) < order.index("result.json")
    assert order.index("recipe.yaml") < order.index("checkpoints/checkpoint-3/model.safetensors")
    assert run.units == {"checkpoints/checkpoint-3", "model"}


def test_another_machine_gets_state_and_the_newest_checkpoint_only(run: Run) -> None:
    with run.on("a") as held:
        state(held.folder, before_json="{}")
        held.publish(checkpoint(held.folder, 3))
        held.publish(checkpoint(held.folder, 12))
        (held.folder / "shards").mkdir()
        (held.folder / "shards" / "part-0.parquet").write_text("rows", encoding="utf-8")
        held.publish(held.folder / "shards" / "part-0.parquet")
    assert "shards/part-0.parquet" in run.units
    with run.on("b") as held:
        found = {p.relative_to(held.folder).as_posix() for p in held.folder.rglob("*") if p.is_file()}
        assert found == {
            "recipe.yaml", "run.json", "log.jsonl", "before.json", "checkpoints/checkpoint-12/model.safetensors",
            "checkpoints/checkpoint-12/llmkit_checkpoint.json", "shards/part-0.parquet", ".mirror.json",
        }  # fmt: skip
        assert checkpoints.problem(held.folder / "checkpoints" / "checkpoint-12") is None
        held.fetch(held.folder / "checkpoints" / "checkpoint-3")
        assert checkpoints.problem(held.folder / "checkpoints" / "checkpoint-3") is None
        assert [p.name for p in held.published(held.folder / "checkpoints")] == ["checkpoint-12", "checkpoint-3"]


def test_of_a_finished_run_only_the_small_files_come(run: Run) -> None:
    with run.on("a") as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
        done(held.folder)
    with run.on("b") as held:
        assert (held.folder / "result.json").is_file() and not (held.folder / "checkpoints").exists()
    assert "checkpoints/checkpoint-3" in run.units


def test_a_checkpoint_that_is_half_uploaded_is_not_complete_and_the_one_before_is_taken(
    run: Run, faults: Faults
) -> None:
    with pytest.raises(StoreError) as caught, run.on("a") as held:
        state(held.folder)
        first = checkpoint(held.folder, 3)
        held.publish(first)
        held._uploads.close()  # it is up before the store fails
        held._uploads = type(held._uploads)(held.folder, held._carry_out, run.notes.append, 0.0)
        faults.part = "checkpoint-6/model"
        held.publish(checkpoint(held.folder, 6))
    assert caught.value.exit_code == 6
    assert "checkpoint-6" in str(caught.value) and str(run.machine("a")) in str(caught.value)
    assert "checkpoints/checkpoint-6/llmkit_checkpoint.json" in run.store.sizes()
    assert run.units == {"checkpoints/checkpoint-3"}
    faults.part = ""
    with run.on("b") as held:
        assert checkpoints.last_complete(held.folder / "checkpoints")[0] == held.folder / "checkpoints" / "checkpoint-3"
        assert not (held.folder / "checkpoints" / "checkpoint-6").exists()


def test_the_same_machine_uploads_later_what_it_could_not(run: Run, faults: Faults) -> None:
    faults.part = "checkpoint-6"
    with pytest.raises(StoreError) as caught, run.on("a") as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
        held.publish(checkpoint(held.folder, 6))
        (held.folder / "model").mkdir()
        (held.folder / "model" / "config.json").write_text("{}", encoding="utf-8")
        done(held.folder)
    assert run.store.read("result.json") is None and "model" not in run.units
    assert all(name in str(caught.value) for name in ("checkpoint-6", "model", "result.json"))
    faults.part = ""
    faults.written.clear()
    with run.on("a") as held:
        assert (held.folder / "result.json").is_file()
        held.begin(done=True)
    assert run.units == {"checkpoints/checkpoint-3", "checkpoints/checkpoint-6", "model"}
    assert faults.written[-1] == "result.json"
    assert not any("checkpoint-3/" in name for name in faults.written)  # it is there already


def test_a_store_that_comes_back_costs_nothing_but_time(run: Run, faults: Faults) -> None:
    faults.part = "checkpoint-3"
    threading.Timer(0.3, lambda: setattr(faults, "part", "")).start()
    with run.on("a", patience_s=20) as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
    assert run.units == {"checkpoints/checkpoint-3"}
    assert len([note for note in run.notes if "tried again" in note]) == 1


@pytest.mark.parametrize("error", [StoppedEarly("stopped by SIGTERM"), DataError("a bad row")])
def test_a_run_that_stops_has_uploaded_its_checkpoint_before_it_ends(run: Run, error: Exception) -> None:
    with pytest.raises(type(error)), run.on("a") as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
        raise error
    assert run.units == {"checkpoints/checkpoint-3"}


def test_a_stop_whose_checkpoint_did_not_arrive_is_no_stop_with_a_checkpoint(
    run: Run, faults: Faults, capsys: pytest.CaptureFixture[str]
) -> None:
    faults.part = "checkpoint-3"
    with pytest.raises(StoreError), run.on("a") as held:
        held.publish(checkpoint(held.folder, 3))
        raise StoppedEarly("stopped by SIGTERM")
    with pytest.raises(DataError), run.on("a") as held:  # the first error stays the one that is told
        held.publish(checkpoint(held.folder, 3))
        raise DataError("a bad row")
    assert "checkpoint-3" in capsys.readouterr().err


def test_a_published_checkpoint_may_be_removed_at_once(run: Run, faults: Faults) -> None:
    faults.part = "checkpoint-3"
    with run.on("a", patience_s=20) as held:
        made = checkpoint(held.folder, 3)
        held.publish(made)
        checkpoints._remove(made)
        faults.part = ""
    assert run.units == {"checkpoints/checkpoint-3"}


def test_an_old_checkpoint_goes_marker_first_and_after_the_newer_one_is_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    real = Store.delete

    def delete(store: Store, names: Any) -> None:
        names = list(names)
        faults.written += [f"delete {name}" for name in names]
        real(store, names)

    monkeypatch.setattr(Store, "delete", delete)
    with run.on("a", patience_s=5) as held:
        held.publish(checkpoint(held.folder, 3))
        faults.part = "checkpoint-6"
        held.publish(checkpoint(held.folder, 6))
        held.retire(held.folder / "checkpoints" / "checkpoint-3")
        faults.part = ""
    assert run.units == {"checkpoints/checkpoint-6"}
    assert not [name for name in run.store.sizes() if "checkpoint-3" in name]
    order = faults.written
    gone = order.index(f"delete {marker_of('checkpoints/checkpoint-3')}")
    assert order.index(marker_of("checkpoints/checkpoint-6")) < gone
    assert gone < order.index("delete checkpoints/checkpoint-3/model.safetensors")


def test_an_old_checkpoint_that_cannot_be_removed_does_not_hide_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(store: Store, names: Any) -> None:
        raise StoreError(f"The store of {store.uri} does not answer.", passing=True)

    with pytest.raises(StoreError, match=r"yet: model, result\.json"), run.on("a") as held:
        made = checkpoint(held.folder, 3)
        held.publish(made)
        held._uploads.close()
        held._uploads = type(held._uploads)(held.folder, held._carry_out, run.notes.append, 0.0)
        monkeypatch.setattr(Store, "delete", delete)
        held.retire(made)
        (held.folder / "model").mkdir()
        (held.folder / "model" / "config.json").write_text("{}", encoding="utf-8")
        done(held.folder)


def test_a_unit_that_was_damaged_in_the_store_is_passed_over_with_a_line(run: Run) -> None:
    with run.on("a") as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
        held.publish(checkpoint(held.folder, 6))
        held.publish(checkpoint(held.folder, 9))
    run.store.delete(["checkpoints/checkpoint-9/model.safetensors"])
    run.store.write(marker_of("checkpoints/checkpoint-6"), b"{")
    with run.on("b") as held:
        assert [p.name for p in (held.folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert any("checkpoint-9" in note and "missing" in note for note in run.notes)
    assert any("checkpoint-6" in note and "damaged" in note for note in run.notes)


def test_a_file_with_other_bytes_than_its_marker_says_is_refused(run: Run) -> None:
    with run.on("a") as held:
        held.publish(checkpoint(held.folder, 3))
    run.store.write("checkpoints/checkpoint-3/model.safetensors", b"weightz 3")
    with pytest.raises(StoreError, match="digest"), run.on("b"):
        pass


def test_who_worked_last_is_believed(run: Run) -> None:
    """A goes on after B has gone further: B's checkpoint counts, and what A never uploaded is kept beside."""
    with run.on("a") as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
    checkpoint(run.machine("a"), 6, "never uploaded")
    with run.on("b") as held:
        held.publish(checkpoint(held.folder, 9))
    with run.on("a") as held:
        assert [p.name for p in (held.folder / "checkpoints").iterdir()] == ["checkpoint-9"]
    aside = run.machine("a").with_name("mine-0.1")
    assert (aside / "checkpoints" / "checkpoint-6").is_dir()
    assert any(str(aside) in note for note in run.notes)


def test_a_folder_that_was_removed_from_the_store_begins_anew_and_the_old_work_is_kept(run: Run) -> None:
    with run.on("a") as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
    run.store.delete(list(run.store.sizes()))
    with run.on("a") as held:
        assert not (held.folder / "checkpoints").exists()
    assert (run.machine("a").with_name("mine-0.1") / "checkpoints" / "checkpoint-3").is_dir()


def test_an_old_run_is_moved_aside_whole(run: Run) -> None:
    with run.on("a") as held:
        state(held.folder)
        held.publish(checkpoint(held.folder, 3))
    with run.on("a") as held:
        where = held.set_aside()
        assert where == f"{run.uri}.1"
        assert {p.name for p in held.folder.iterdir()} <= {".lock", ".mirror.json"}
        state(held.folder)
        held.begin(done=False)
    assert run.units == set()
    assert set(Contents.of(Store(where)).units) == {"checkpoints/checkpoint-3"}
    assert not run.machine("a").with_name("mine-0.1").exists()  # all of it is in the store


def test_nothing_that_counts_is_written_after_somebody_else_took_over(run: Run) -> None:
    with pytest.raises(UsageError, match="taken over"), run.on("a") as held:
        run.store.write(LEASE, Claim.ours("somebody else").to_bytes())
        held.publish(checkpoint(held.folder, 3))
    assert run.units == set()


def test_tracking_never_counts_more_of_the_log_than_is_in_the_store(run: Run, faults: Faults) -> None:
    with run.on("a") as held:
        state(held.folder, tracking_json="{}")
        held.push()
    assert faults.written.index("log.jsonl") < faults.written.index("tracking.json")


def test_every_machine_uploads_its_part_before_a_checkpoint_is_complete(run: Run) -> None:
    """Rank 0's machine waits for the other's part; both then have the whole checkpoint."""
    with run.on("a", patience_s=20, count=2) as first:
        other = run.machine("b")
        with mirror.followed(
            run.uri, other, first.session, run.notes.append, Nodes(number=1, count=2), patience_s=20
        ) as second:
            assert second is not None
            first.publish(checkpoint(first.folder, 3), divided=True)
            assert "checkpoints/checkpoint-3" not in run.units
            work = checkpoints.staging(other / "checkpoints", 3)
            (work / "rng_state_1.pth").write_text("of rank 1", encoding="utf-8")
            second.publish_part(work, other / "checkpoints" / "checkpoint-3")
    marker = Contents.of(run.store).units["checkpoints/checkpoint-3"]
    assert {name.rpartition("/")[2] for name in marker.files} == {
        "model.safetensors", "llmkit_checkpoint.json", "rng_state_1.pth",
    }  # fmt: skip
    with run.on("a", count=2) as first, mirror.followed(
        run.uri, other, first.session, run.notes.append, Nodes(number=1, count=2), patience_s=0
    ):  # fmt: skip
        for folder in (first.folder, other):
            found = folder / "checkpoints" / "checkpoint-3"
            assert checkpoints.problem(found) is None and (found / "rng_state_1.pth").is_file()


def test_a_checkpoint_without_the_part_of_a_lost_machine_is_not_complete(run: Run) -> None:
    with pytest.raises(StoreError, match="another machine"), run.on("a", count=2) as first:
        first.publish(checkpoint(first.folder, 3), divided=True)
    assert run.units == set()


def test_the_second_process_of_another_machine_gets_no_mirror_but_the_files(run: Run) -> None:
    with run.on("a", patience_s=5) as first:
        state(first.folder)
        first.push()
        with mirror.followed(
            run.uri, run.machine("b"), first.session, run.notes.append, Nodes(1, 2, local_rank=1), patience_s=0
        ) as none:
            assert none is None
        assert (run.machine("b") / "recipe.yaml").is_file()
