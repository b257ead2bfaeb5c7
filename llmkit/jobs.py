"""What ``llmkit jobs`` and ``--launcher`` do for launchers that run a job elsewhere; each gives back a reply."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkit import launch, rundir, runner
from llmkit.context import Result
from llmkit.errors import LlmkitError, MissingError, UsageError
from llmkit.launch import record as records
from llmkit.launch import remote
from llmkit.launch.record import JobStatus, Record
from llmkit.recipe import Recipe
from llmkit.reply import Reply
from llmkit.runner import Prepared

RUNS = Path("runs")


@dataclass(frozen=True)
class How:
    """How runs are started: the options of the command line."""

    launcher: str
    resume: str = "auto"
    dry_run: bool = False
    debug: bool = False
    wait: bool = False
    after: Sequence[str] = ()


def start(stage: str, runs: Sequence[Recipe], how: How) -> Reply:
    """Submit one run, or those of a sweep."""
    found = [runner.look(recipe, stage, how.resume) for recipe in runs]
    if how.dry_run:
        return _rendered(found, stage, how)
    recipes = [one.recipe for one in found]
    if len(recipes) == 1:
        return _started(
            remote.submit(recipes[0], stage, how.launcher, how.resume, after=how.after, debug=how.debug), how
        )
    return _sweep_started(remote.submit_sweep(recipes, stage, how.launcher, how.resume, after=how.after), how)


def _rendered(found: Sequence[Prepared], stage: str, how: How) -> Reply:
    """Exactly what would be submitted, on stdout; all else on stderr."""
    where = launch.load(how.launcher)
    recipes = [one.recipe for one in found]
    job = remote.job_of(recipes, stage, how.launcher, token=remote.token_of(found), debug=how.debug)
    text = where.render(job, where.waiting_for(recipes[0].launch, how.after))
    folders = ", ".join(recipe.output_dir for recipe in recipes)
    print(f"processes:      {where.describe(job)}\noutput folder:  {folders}", file=sys.stderr, flush=True)
    data = {"dry_run": True, "stage": stage, "launcher": how.launcher, "output_dirs": folders, "text": text}
    return Reply(text, data)


def _started(outcome: remote.Submitted | Result, how: How) -> Reply:
    if isinstance(outcome, Result):
        print(f"{outcome.uri or outcome.output_dir}: finished on {outcome.finished_at}, nothing to do", file=sys.stderr)
        return Reply(data=json.loads(outcome.to_json()))
    record = outcome.record
    said = "submitted" if outcome.new else "is there already, nothing was submitted"
    print(f"Job {record.id} ({record.launcher}) {said}: {_words(outcome.status)}", file=sys.stderr, flush=True)
    if not how.wait:
        print(f"Follow it: llmkit jobs logs {record.uri or record.output_dir} -f", file=sys.stderr, flush=True)
        return Reply(data=_data(record, outcome.status) | {"new": outcome.new})
    return _waited(remote.wait(record, follow=remote.to_stderr))


def _sweep_started(outcomes: Sequence[remote.Submitted | Result], how: How) -> Reply:
    data = [json.loads(one.to_json()) if isinstance(one, Result) else _data(one.record, one.status) for one in outcomes]
    jobs = [one.record for one in outcomes if isinstance(one, remote.Submitted)]
    print(f"{len(jobs)} jobs of a sweep: {', '.join(record.id for record in jobs)}", file=sys.stderr, flush=True)
    if how.wait:
        for record in jobs:
            data[[d.get("output_dir") for d in data].index(str(record.output_dir))] = json.loads(
                remote.wait(record).to_json()
            )
    return Reply(data={"runs": data})


# llmkit jobs


def listing(folder: str) -> Reply:
    """``llmkit jobs list [FOLDER]``. A scheduler that does not answer costs its jobs' states, not the list."""
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UsageError(f"There is no folder {folder}.")
    rows = [(record, _status_or_why(record)) for record in records.find_all(path)]
    if not rows:
        return Reply(f"No jobs in {folder}.", {"jobs": []})
    lines = [f"{'JOB':<14} {'LAUNCHER':<12} {'STATE':<10} {'SUBMITTED':<26} FOLDER"]
    for record, known in rows:
        words = known.state if isinstance(known, JobStatus) else "unknown"
        shown = _short(record.output_dir)
        lines.append(f"{record.id or '-':<14} {record.launcher:<12} {words:<10} {record.submitted_at:<26} {shown}")
        if why := known.reason if isinstance(known, JobStatus) else known:
            lines.append(f"{'':<14} {why}")
    return Reply("\n".join(lines), {"jobs": [_data(record, known) for record, known in rows]})


def _status_or_why(record: Record) -> JobStatus | str:
    try:
        return remote.status(record)
    except LlmkitError as error:
        return str(error)


def status(job: str) -> Reply:
    """``llmkit jobs status JOB``."""
    record = _submitted(job)
    known = remote.status(record)
    return Reply(f"{record.id}: {_words(known)}", _data(record, known))


def logs(job: str, *, follow: bool) -> Reply:
    """``llmkit jobs logs JOB [-f]``: on stdout, as it comes."""
    record = _submitted(job)
    for text in remote.launcher_of(record).logs(record, follow):
        sys.stdout.write(text)
        sys.stdout.flush()
    return Reply()


def cancel(job: str) -> Reply:
    """``llmkit jobs cancel JOB``."""
    record = _submitted(job)
    known = remote.status(record)
    if known.final:
        raise UsageError(f"Job {record.id} has ended already: {_words(known)}.")
    remote.launcher_of(record).cancel(record)
    return Reply(f"{record.id}: cancelled", _data(record, JobStatus("cancelled")))


def wait(job: str) -> Reply:
    """``llmkit jobs wait JOB``: the run's result, or its error and exit code."""
    return _waited(remote.wait(_submitted(job)))


def _submitted(job: str) -> Record:
    record = records.resolve(job, RUNS)
    if not record.id:
        raise MissingError(f"{job}: its submission was interrupted. The same command submits it, or finds its job.")
    return record


def _waited(result: Result) -> Reply:
    from llmkit.summary import summary

    print(summary(result), file=sys.stderr, flush=True)
    return Reply(data=json.loads(result.to_json()))


def _words(known: JobStatus) -> str:
    more = [known.reason] if known.reason else []
    more += [f"started {known.restarts + 1} times"] if known.restarts else []
    return known.state.replace("_", " ") + (f" ({', '.join(more)})" if more else "")


def _data(record: Record, known: JobStatus | str) -> dict[str, Any]:
    found = asdict(known) if isinstance(known, JobStatus) else {"state": "unknown", "reason": known}
    run_id = rundir.tracked_run(record.output_dir)
    return {
        "id": record.id, "launcher": record.launcher, "stage": record.stage, "name": record.name,
        "output_dir": str(record.output_dir), "submitted_at": record.submitted_at, "run_id": run_id, **found,
    }  # fmt: skip


def _short(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
