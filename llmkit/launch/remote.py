"""What launchers have in common that run a job elsewhere: submit it once, follow it, end with the run's own exit code.

The order of a submission is what makes it happen once: the recipe is frozen in the folder, ``job.json`` is written with a
token, the job is submitted with the token in it, its id is written down. Whatever is interrupted, the next start finds
the job by its token, or knows that there is none.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from filelock import FileLock, Timeout

from llmkit import launch, mirror, rundir, runner, uris
from llmkit.context import Result
from llmkit.errors import LlmkitError, MissingError, ProcessLostError, StoppedEarly, UsageError
from llmkit.launch import record as records
from llmkit.launch.job import Job
from llmkit.launch.record import JobStatus, Place, Record
from llmkit.recipe import Recipe, dump
from llmkit.runner import Prepared

POLL_SECONDS = 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class Submitted:
    """``new`` is False where the run has been submitted before and its job is still there."""

    record: Record
    status: JobStatus
    new: bool


def job_of(recipes: Sequence[Recipe], stage: str, launcher: str, *, token: str = "", debug: bool = False) -> Job:
    """The job that starts a recipe whose ``output_dir`` is absolute, or those of a sweep."""
    first = recipes[0]
    folder = runner.folder_of(first)
    files = [uris.recipe_of(recipe.output_dir, runner.folder_of(recipe)) for recipe in recipes]
    argv = ("llmkit", "run", files[0], *(["--debug"] if debug else []))
    return Job(
        argv, folder, Path.cwd(), resources=launch.load(launcher).resources(first), name=first.name, stage=stage, token=token,
        recipe=dump(first), sweep=tuple(files) if len(files) > 1 else (), remote=uris.is_uri(first.output_dir),
    )  # fmt: skip


def token_of(runs: Sequence[Prepared]) -> str:
    """What marks a submission, the same each time it is rendered: its runs, and which submission of theirs it is."""
    parts = [text for one in runs for text in (one.recipe.output_dir, dump(one.recipe), *_jobs_before(one))]
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]


def _jobs_before(prepared: Prepared) -> tuple[str, ...]:
    """Ids of the jobs that a run was; none for a run that begins anew, whose old folder is set aside."""
    before = records.read(prepared.folder) if prepared.finding.state != "set_aside" else None
    return () if before is None else (*before.earlier, *([before.id] if before.id else []))


def submit(
    recipe: Recipe, stage: str, launcher: str, resume: str, *, after: Sequence[str] = (), debug: bool = False
) -> Submitted | Result:
    """Put a run into a scheduler's queue, or give back the result of a finished one, or the job that it is already.

    Raises the classes of ``llmkit.errors``: UsageError for a job that the scheduler refuses or will never start,
    MissingError where there is no such scheduler here.
    """
    (outcome,) = submit_sweep([recipe], stage, launcher, resume, after=after, debug=debug)
    return outcome


def submit_sweep(
    recipes: Sequence[Recipe], stage: str, launcher: str, resume: str, *, after: Sequence[str] = (), debug: bool = False
) -> list[Submitted | Result]:
    """The same for the runs of a sweep, as one array of jobs; those that are finished or in the queue are left alone."""
    where = launch.load(launcher)
    where.check(recipes[0].launch)
    outcomes: dict[str, Submitted | Result] = {}
    with ExitStack() as stack:
        left: list[Recipe] = []
        for recipe in recipes:
            folder = runner.folder_of(recipe)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_submitting(folder))
            known = _known_already(_seen(recipe, stage, resume))
            if known is None:
                left.append(recipe)
            else:
                outcomes[recipe.output_dir] = known
        ready: list[Prepared] = []
        for recipe in left:
            prepared = _frozen(recipe, stage, resume)
            if (result := _finished(prepared)) is not None:  # in an object store, which is asked only now
                outcomes[recipe.output_dir] = result
            else:
                ready.append(prepared)
        if ready:
            new = _submit_anew(ready, launcher, after, debug)
            outcomes |= {one.recipe.output_dir: submitted for one, submitted in zip(ready, new, strict=True)}
    return [outcomes[recipe.output_dir] for recipe in recipes]


@contextmanager
def _submitting(folder: Path) -> Iterator[None]:
    """One submission of a run at a time. Not the folder's own lock: the job takes that, maybe at once."""
    lock = FileLock(folder / ".job.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"Another llmkit process is submitting {folder}. Wait for it.") from None
    try:
        yield
    finally:
        lock.release()


def _seen(recipe: Recipe, stage: str, resume: str) -> Prepared:
    """What is known of the run before it is claimed: of one in an object store only its job and its result."""
    found = runner.look(recipe, stage, resume)
    if found.uri is not None:
        with mirror.peek(found.uri, [records.RECORD]) as copy:
            record = records.read(copy)
        if record is not None:
            replace(record, output_dir=found.folder).write()
    return found


def _frozen(recipe: Recipe, stage: str, resume: str) -> Prepared:
    with runner.understood(runner.folder_of(recipe)):
        return runner.prepare(recipe, stage, resume)


def _finished(prepared: Prepared) -> Result | None:
    if prepared.finding.state != "done" or prepared.finding.result is None:
        return None
    return replace(prepared.finding.result, output_dir=prepared.folder, uri=prepared.uri)


def _known_already(prepared: Prepared) -> Submitted | Result | None:
    """The result of a finished run, or the job that a run is already; None where one has to be submitted."""
    if (result := _finished(prepared)) is not None:
        return result
    before = records.read(prepared.folder)
    if before is None:
        return None
    where = launch.load(before.launcher)
    if not before.id:
        place = where.find(before)
        if place is None:
            return None
        before = before.placed(place)
        before.write()
    status: JobStatus = where.status(before)
    if status.final:
        return None
    if prepared.finding.state == "set_aside":
        raise UsageError(
            f"Job {before.id} of the run in {prepared.folder} is {status.state}, and this recipe is another: "
            f"{prepared.finding.why}. Cancel it (llmkit jobs cancel {prepared.folder}), or give another --output-dir."
        )
    return Submitted(before, status, new=False)


def _submit_anew(runs: Sequence[Prepared], launcher: str, after: Sequence[str], debug: bool) -> list[Submitted]:
    where = launch.load(launcher)
    token = token_of(runs)
    job = job_of([one.recipe for one in runs], runs[0].stage, launcher, token=token, debug=debug)
    settings = where.waiting_for(runs[0].recipe.launch, after)
    where.render(job, settings)  # what cannot be rendered is not recorded as submitted
    before = [records.read(one.folder) for one in runs]
    new = [_record(one, job, launcher, i) for i, one in enumerate(runs)]
    for one, record in zip(runs, new, strict=True):
        record.write()
        announce(one, record)
        one.push()  # the job may begin at once, on another machine
    placed: list[Record] = []
    try:
        place: Place = where.submit(job, settings)
        placed = [record.placed(where.part(place, i) if job.sweep else place) for i, record in enumerate(new)]
        for one, record in zip(runs, placed, strict=True):
            record.write()
            one.push(records.RECORD)  # the rest is the job's by now
        states = [where.look_after(record) for record in placed]
    except UsageError:
        _take_back(placed, where)
        for record, old in zip(new, before, strict=True):
            old.write() if old is not None else (record.output_dir / records.RECORD).unlink()
        raise
    # A scheduler that does not answer may have the job all the same: the record stays, and the next start asks for it.
    for one, record in zip(runs, placed, strict=True):
        name_job(one, record)
    return [Submitted(record, status, new=True) for record, status in zip(placed, states, strict=True)]


def _take_back(placed: Sequence[Record], where: ModuleType) -> None:
    """Cancel what was submitted of a job that is refused; some of it may be gone already."""
    for record in placed:
        with suppress(LlmkitError):
            where.cancel(record)


def _record(prepared: Prepared, job: Job, launcher: str, index: int) -> Record:
    where = {"logs": str(job.logs)} | ({"index": str(index)} if job.sweep else {})
    return Record(
        launcher, job.token, prepared.recipe.name, prepared.stage, prepared.folder, records.now(),
        where=where, earlier=_jobs_before(prepared), uri=prepared.uri or "",
    )  # fmt: skip


def announce(prepared: Prepared, record: Record) -> None:
    """Make the run's MLflow run now, so that a queued job is seen there; the job goes on with it."""
    from llmkit.tracking import announce as announce_run

    recipe = prepared.recipe
    tags = {"llmkit.launcher": record.launcher, "llmkit.output_dir": str(record.output_dir)}
    announce_run(recipe.tracking, output_dir=prepared.folder, name=recipe.name, stage=prepared.stage, tags=tags)


def name_job(prepared: Prepared, record: Record) -> None:
    """Tell the MLflow run which job it is. Not through the run's log: the job may write that by now."""
    from llmkit.tracking import tag_run

    run_id = rundir.tracked_run(prepared.folder)
    if run_id is not None:
        link = dict(record.where).get("link", "")
        tag_run(
            prepared.recipe.tracking, run_id, {"llmkit.job_id": record.id} | ({"llmkit.job_link": link} if link else {})
        )


# Following


def status(record: Record) -> JobStatus:
    """How a job stands. A scheduler forgets, a result does not: a finished run is ``done`` whatever is left of its job."""
    result = result_of(record)
    if result is not None and result.status == "done":
        return JobStatus("done", exit_code=0)
    found: JobStatus = launch.load(record.launcher).status(record)
    return found


def result_of(record: Record) -> Result | None:
    """What the run has written of its end, here or in the object store that its folder is in."""
    if not record.uri:
        return rundir.read_result(record.output_dir)
    with mirror.peek(record.uri, [rundir.RESULT]) as copy:
        return rundir.read_result(copy)


def wait(record: Record, *, follow: Callable[[str], None] | None = None) -> Result:
    """Wait for a job's end, handing on what it logs; the run's result, or the error that it ended with."""
    where = launch.load(record.launcher)
    log = where.Log(record) if follow is not None else None
    while True:
        known = retried(lambda: status(record))
        if log is not None and follow is not None and (text := log.more()):
            follow(text)
        if known.final:
            break
        time.sleep(POLL_SECONDS)
    if log is not None and follow is not None and (text := log.rest()):
        follow(text)
    return conclude(record, known)


def retried(call: Callable[[], T], attempts: int = 8) -> T:
    """``call()``, again after a pause that doubles while the scheduler does not answer (up to about four minutes)."""
    for attempt in range(attempts):
        try:
            return call()
        except MissingError:
            if attempt == attempts - 1:
                raise
            time.sleep(min(60.0, 2.0**attempt))
    raise AssertionError("unreachable")


def conclude(record: Record, known: JobStatus) -> Result:
    """The result of a job that has ended. Raises what the run ended with."""
    result = result_of(record)
    if result is not None and result.status == "done":
        return replace(result, output_dir=record.output_dir)
    said = f": {known.reason}" if known.reason else ""
    words = f"Job {record.id} ({record.launcher}) {known.state.replace('_', ' ')}{said}."
    if known.state in ("failed", "timed_out", "preempted") and result is not None and result.error:
        raise _as_error(result, f"{words}\n{result.error}")
    if known.state == "cancelled":
        raise ProcessLostError(f"{words} The same command goes on from the last checkpoint.")
    raise ProcessLostError(f"{words} See: llmkit jobs logs {record.output_dir}")


def _as_error(result: Result, message: str) -> LlmkitError:
    if result.status == "stopped":
        return StoppedEarly(message)
    kinds: Sequence[type[LlmkitError]] = (UsageError, MissingError, *LlmkitError.__subclasses__())
    kind = next((k for k in kinds if k.exit_code == result.exit_code), LlmkitError)
    return kind(message)


def launcher_of(record: Record) -> ModuleType:
    return launch.load(record.launcher)


def to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
