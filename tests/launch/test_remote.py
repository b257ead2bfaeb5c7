"""Submitting once: what stays behind when a scheduler refuses, or does not answer in the middle.

The scheduler is a stand-in that fails at a chosen point; the real Slurm, in tests/integration, cannot be made to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llmkit import launch
from llmkit.errors import LlmkitError, MissingError, UsageError
from llmkit.launch import record as records
from llmkit.launch import remote
from llmkit.launch.job import Job, Resources
from llmkit.launch.record import JobStatus, Place, Record
from llmkit.recipe import LaunchSettings, Recipe, parse


class Scheduler:
    """Keeps the tokens of the jobs that it has; ``fails`` by the name of the call."""

    fails: ClassVar[dict[str, LlmkitError]] = {}

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.state = JobStatus("queued")

    def resources(self, _recipe: Recipe) -> Resources:
        return Resources()

    def check(self, _settings: LaunchSettings) -> None: ...

    def waiting_for(self, settings: LaunchSettings, _after: Sequence[str]) -> LaunchSettings:
        return settings

    def render(self, job: Job, _settings: LaunchSettings) -> str:
        return job.token

    def submit(self, job: Job, _settings: LaunchSettings) -> Place:
        if "refuse" in self.fails:
            raise self.fails["refuse"]
        self.jobs[job.token] = number = str(len(self.jobs) + 1)
        if "submit" in self.fails:
            raise self.fails["submit"]
        return Place(number)

    def part(self, place: Place, index: int) -> Place:
        return Place(f"{place.id}_{index}")

    def find(self, record: Record) -> Place | None:
        found = self.jobs.get(record.token)
        return Place(found) if found else None

    def look_after(self, _record: Record) -> JobStatus:
        if "look_after" in self.fails:
            raise self.fails["look_after"]
        return self.state

    def status(self, _record: Record) -> JobStatus:
        return self.state

    def cancel(self, record: Record) -> None:
        self.cancelled.append(record.id)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scheduler:
    made = Scheduler()
    monkeypatch.setattr(launch, "load", lambda _: made)
    monkeypatch.setattr(Scheduler, "fails", {})
    monkeypatch.chdir(tmp_path)
    return made


def recipe(name: str = "a") -> Recipe:
    keys: dict[str, Any] = {
        "name": name,
        "output_dir": str(Path("runs", name).absolute()),
        "tracking": {"enabled": False},
    }
    return parse(keys, Recipe)


def submit(stage: str = "sft") -> remote.Submitted:
    found = remote.submit(recipe(), stage, "slurm", "auto")
    assert isinstance(found, remote.Submitted)
    return found


def test_the_token_is_that_of_a_dry_run_and_another_for_another_attempt(scheduler: Scheduler) -> None:
    from llmkit import runner

    shown = remote.token_of([runner.look(recipe(), "sft")])
    first = submit()
    assert first.record.token == shown
    scheduler.state = JobStatus("failed")
    again = submit()
    assert again.new
    assert again.record.token != shown
    assert again.record.earlier == (first.record.id,)


@pytest.mark.parametrize("point", ["submit", "look_after"])
def test_a_scheduler_that_stops_answering_in_the_middle_is_asked_and_gets_no_second_job(
    scheduler: Scheduler, point: str
) -> None:
    scheduler.fails[point] = MissingError("Slurm does not answer")
    with pytest.raises(MissingError):
        submit()
    scheduler.fails.clear()
    again = submit()
    assert not again.new
    assert again.record.id == "1"
    assert len(scheduler.jobs) == 1


def test_what_is_refused_leaves_the_record_of_the_job_before(scheduler: Scheduler) -> None:
    first = submit()
    scheduler.state = JobStatus("failed")
    scheduler.fails["refuse"] = UsageError("no such partition")
    with pytest.raises(UsageError):
        submit()
    kept = records.read(first.record.output_dir)
    assert kept is not None
    assert kept.id == first.record.id


def test_a_sweep_that_will_never_start_is_taken_back_whole(scheduler: Scheduler) -> None:
    scheduler.fails["look_after"] = UsageError("will never start")
    with pytest.raises(UsageError):
        remote.submit_sweep([recipe("a"), recipe("b")], "sft", "slurm", "auto")
    assert scheduler.cancelled == ["1_0", "1_1"]
    assert not list(Path("runs").rglob(records.RECORD))
