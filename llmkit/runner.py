"""Prepare and run: the only place that makes the output folder, seeds, opens the tracker, handles signals and
writes ``result.json`` (last)."""

from __future__ import annotations

import json
import logging
import random
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from llmkit import __version__, errors, mirror, rundir, stages, uris
from llmkit.context import Progress, Result, RunContext, Status, StopFlag, Tracker
from llmkit.errors import GateError, LlmkitError, ProcessLostError, StoppedEarly, UsageError
from llmkit.faults import EXIT_BUG, EXIT_INTERRUPTED, describe_bug, translate
from llmkit.mirror import Mirror
from llmkit.progress import open_progress, quiet_libraries
from llmkit.ranks import Meeting, Nodes, Ranks
from llmkit.recipe import Recipe, dump
from llmkit.rundir import Finding
from llmkit.secrets import mask

_log = logging.getLogger("llmkit.mirror")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: its recipe has an absolute ``output_dir`` or a URI, ``folder`` is where it works on this
    machine; ``resume`` is what the stage is told."""

    stage: str
    recipe: Recipe
    folder: Path
    resume: str
    finding: Finding
    lock: int | None = None
    """File descriptor of the folder's lock, while this process holds it."""
    mirror: Mirror | None = None
    """What keeps ``folder`` and the folder in an object store alike, while the run is claimed."""

    @property
    def uri(self) -> str | None:
        """The run's folder where it is in an object store."""
        return self.recipe.output_dir if uris.is_uri(self.recipe.output_dir) else None

    def push(self, *names: str) -> None:
        """Have the small files of the folder, or those, where another machine finds them; nothing to do for a local
        folder."""
        if self.mirror is not None:
            self.mirror.push(*names)


def folder_of(recipe: Recipe) -> Path:
    """Where a run of ``recipe`` works on this machine."""
    return uris.workplace(recipe.output_dir, recipe.launch.scratch_dir)


def look(recipe: Recipe, stage: str, resume: str = "auto", *, check_data: bool = False) -> Prepared:
    """What ``prepare`` would find, touching nothing and asking no store. ``UsageError`` where it would refuse."""
    resume = _checked_resume(resume)
    folder = folder_of(recipe)
    if uris.is_uri(recipe.output_dir):
        recipe = recipe.model_copy(update={"output_dir": recipe.output_dir.rstrip("/")})
        return Prepared(stage, recipe, folder, resume, Finding("unseen"))
    data = _data_digests(recipe) if check_data else None
    finding = rundir.examine(folder, stage, recipe, resume, data)
    return Prepared(stage, recipe.model_copy(update={"output_dir": str(folder)}), folder, resume, finding)


def prepare(recipe: Recipe, stage: str, resume: str = "auto") -> Prepared:
    """Make the output folder and freeze the resolved recipe in it, for a launcher that starts the run elsewhere."""
    with claimed(recipe, stage, resume) as prepared:
        return prepared


@contextmanager
def claimed(recipe: Recipe, stage: str, resume: str, stop: StopFlag | None = None) -> Iterator[Prepared]:
    """Hold the folder's lock with the recipe frozen in it; a finished run's folder is left as it is.

    A folder in an object store is claimed there too, and up to date there when this is left: StoreError where not.
    """
    data = _data_digests(recipe)
    prepared = look(recipe, stage, resume)  # refuses a folder that is not ours before a lock file is put in it
    with ExitStack() as stack:
        lock = stack.enter_context(rundir.locked(prepared.folder))
        remote = stack.enter_context(_held(prepared, stop or StopFlag())) if prepared.uri is not None else None
        finding = rundir.examine(prepared.folder, stage, recipe, prepared.resume, data)
        if finding.state == "set_aside":
            if remote is not None:
                old = remote.set_aside()
            else:
                old = str(rundir.set_aside(prepared.folder))
                lock = stack.enter_context(rundir.locked(prepared.folder))
            finding = replace(finding, why=f"the old folder is now {old}: {finding.why}")
        if finding.state != "done":
            now = datetime.now(UTC).isoformat(timespec="seconds")
            rundir.freeze(prepared.folder, stage, prepared.recipe, data, __version__, now)
        if remote is not None:
            remote.begin(done=finding.state == "done")
        yield replace(prepared, finding=finding, lock=lock, mirror=remote)


def _held(prepared: Prepared, stop: StopFlag) -> AbstractContextManager[Mirror]:
    assert prepared.uri is not None
    patience_s = prepared.recipe.launch.upload_minutes * 60
    return mirror.held(
        prepared.uri, prepared.folder, _log.warning, stop.request, Nodes.from_environment(), patience_s=patience_s
    )


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """What goes wrong before a run can record it, as one of llmkit's errors where it is one."""
    try:
        yield
    except Exception as exc:
        known = translate(exc, folder)
        if known is None or known is exc:
            raise
        raise known from exc


def run(recipe: Recipe, stage: str, resume: str = "auto") -> Result:
    """Run ``stage`` in this process, from an empty folder or from where an earlier start of the same run ended.

    A finished run is not run again: its result comes back. Raises the classes of ``llmkit.errors``; anything else
    that is raised is a bug, and its traceback is in the output folder.
    """
    ranks = Ranks.from_environment()
    quiet_libraries()
    folder = folder_of(recipe)
    stop = StopFlag()
    with ExitStack() as stack:
        stack.enter_context(listening(stop))
        with understood(folder):
            meeting = Meeting(ranks, timedelta(minutes=recipe.launch.timeout_minutes)) if ranks.world_size > 1 else None
            prepared = stack.enter_context(_agreed(recipe, stage, resume, meeting, stop, is_main=ranks.is_main))
        progress = stack.enter_context(open_progress(rank=ranks.rank))
        if prepared.finding.state == "done" and prepared.finding.result is not None:
            progress.note(f"{prepared.uri or prepared.folder}: {prepared.finding.why}")
            return replace(prepared.finding.result, output_dir=prepared.folder, uri=prepared.uri)
        _announce(prepared, progress)
        return _execute(prepared, ranks, progress, stop, meeting)


def quoted(value: str) -> str:
    """``value`` as the right side of ``KEY=VALUE``, kept a string whatever it looks like."""
    return json.dumps(value, ensure_ascii=False)


# Preparing


@contextmanager
def _agreed(
    recipe: Recipe, stage: str, resume: str, meeting: Meeting | None, stop: StopFlag, *, is_main: bool
) -> Iterator[Prepared]:
    """Rank 0 claims the folder, every other rank takes over what it found."""
    if meeting is None:
        with claimed(recipe, stage, resume, stop) as prepared:
            yield prepared
        return
    if not is_main:
        message = meeting.hear()
        prepared = _follow(message, recipe, stage)
        with _followed(prepared, str(message["session"])) as remote:
            yield replace(prepared, mirror=remote)
        return
    with ExitStack() as stack:
        try:
            prepared = stack.enter_context(claimed(recipe, stage, resume, stop))
        except BaseException as exc:
            known = translate(exc)
            meeting.tell({"error": type(known).__name__ if known else "LlmkitError", "message": str(known or exc)})
            raise
        result = prepared.finding.result
        meeting.tell({
            "state": prepared.finding.state, "why": prepared.finding.why, "resume": prepared.resume,
            "output_dir": prepared.recipe.output_dir, "result": result.to_json() if result else None,
            "session": prepared.mirror.session if prepared.mirror is not None else "",
        })  # fmt: skip
        yield prepared


def _follow(message: Mapping[str, Any], recipe: Recipe, stage: str) -> Prepared:
    if "error" in message:
        kind = getattr(errors, message["error"], LlmkitError)
        # RecipeError takes problems, and its text is already made.
        raise (kind if kind is not errors.RecipeError else UsageError)(message["message"])
    result = Result.from_json(message["result"]) if message["result"] else None
    recipe = recipe.model_copy(update={"output_dir": message["output_dir"]})
    finding = Finding(message["state"], message["why"], result)
    return Prepared(stage, recipe, folder_of(recipe), message["resume"], finding)


def _followed(prepared: Prepared, session: str) -> AbstractContextManager[Mirror | None]:
    """On another machine than rank 0's, a folder of its own is kept like the store's."""
    nodes = Nodes.from_environment()
    if prepared.uri is None or nodes.number == 0 or prepared.finding.state == "done":
        return nullcontext()
    patience_s = prepared.recipe.launch.upload_minutes * 60
    return mirror.followed(prepared.uri, prepared.folder, session, _log.warning, nodes, patience_s=patience_s)


def _checked_resume(resume: str) -> str:
    if resume in ("auto", "never"):
        return resume
    path = Path(resume).expanduser().absolute()
    if not path.is_dir():
        raise UsageError(f"--resume {resume}: there is no such checkpoint folder. Use auto, never or a folder's path.")
    return str(path)


def _data_digests(recipe: Recipe) -> Mapping[str, str]:
    settings = getattr(recipe, "data", None)
    if settings is None:
        return recipe.input_digests()
    from llmkit.data.sources import digest

    return {**digest(settings), **recipe.input_digests()}


def _announce(prepared: Prepared, progress: Progress) -> None:
    """What became of an old folder; a stage that finds a checkpoint says itself from which one it goes on."""
    folder, state = prepared.folder, prepared.finding.state
    if state == "set_aside":
        progress.note(prepared.finding.why)
    elif state == "continue" and (folder / "log.jsonl").exists() and rundir.last_checkpoint(folder) is None:
        progress.note(f"Going on with the run in {folder}, which has no checkpoint yet: from the start")


def record(prepared: Prepared, error: BaseException) -> None:
    """Write ``result.json`` for a run whose own process could not, or knew less; what it had written of itself stays."""
    from llmkit.tracking.state import load_state

    before = rundir.read_result(prepared.folder)
    run_id = before.run_id if before else load_state(prepared.folder).run_id
    known = translate(error, prepared.folder)
    result = Result(
        stage=prepared.stage, name=prepared.recipe.name, output_dir=prepared.folder,
        status="stopped" if isinstance(error, StoppedEarly) else "failed", error=mask(str(error)),
        exit_code=known.exit_code if known else EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_BUG,
        run_id=run_id, finished_at=_now(), uri=prepared.uri,
    )  # fmt: skip
    rundir.write_atomic(prepared.folder / rundir.RESULT, result.to_json() + "\n")


# Running


def _execute(prepared: Prepared, ranks: Ranks, progress: Progress, stop: StopFlag, meeting: Meeting | None) -> Result:
    tracker: Tracker | None = None
    try:
        tracker = _open_tracker(prepared, ranks)
        seed(prepared.recipe.seed)
        ctx = RunContext(
            output_dir=prepared.folder, tracker=tracker, progress=progress, stop=stop, resume=prepared.resume,
            rank=ranks.rank, world_size=ranks.world_size, outbox=prepared.mirror,
        )  # fmt: skip
        result: Result = stages.load(prepared.stage).run(prepared.recipe, ctx)
    except BaseException as exc:
        known = translate(exc, prepared.folder)
        if isinstance(known, ProcessLostError) and meeting is not None and (gone := meeting.gone()):
            known = ProcessLostError(f"{known}\nHere {', '.join(gone)}.")
        _record_failure(prepared, ranks, tracker, exc, known)
        if known is None or known is exc:
            raise
        raise known from exc
    result = replace(
        result, output_dir=prepared.folder, run_id=result.run_id or tracker.run_id, finished_at=_now(), uri=prepared.uri
    )
    _conclude(result, ranks, tracker)
    return result


def _record_failure(
    prepared: Prepared, ranks: Ranks, tracker: Tracker | None, exc: BaseException, known: LlmkitError | None
) -> None:
    status: Status = "stopped" if isinstance(exc, StoppedEarly) else "failed"
    interrupted = isinstance(exc, KeyboardInterrupt)
    if known is not None:
        text, code = str(known), known.exit_code
    elif interrupted:
        text, code = "interrupted", EXIT_INTERRUPTED
    else:
        text, code = describe_bug(exc, prepared.folder), EXIT_BUG
    result = Result(
        stage=prepared.stage, name=prepared.recipe.name, output_dir=prepared.folder, status=status, error=mask(text),
        exit_code=code, run_id=tracker.run_id if tracker else None, finished_at=_now(), uri=prepared.uri,
    )  # fmt: skip
    if isinstance(known, GateError):
        result = replace(result, metrics=known.metrics, artifacts=known.artifacts)
    try:
        _conclude(result, ranks, tracker)
    except (OSError, LlmkitError) as second:
        # A full disk is often the reason for the first error, which must stay the one that is reported.
        print(f"result.json could not be written: {second}", file=sys.stderr)


def _conclude(result: Result, ranks: Ranks, tracker: Tracker | None) -> None:
    """Write the result and close the tracker, in this order: a server that is slow to answer delays no result."""
    try:
        if ranks.is_main:
            path = result.output_dir / rundir.RESULT
            rundir.write_atomic(path, result.to_json() + "\n")
            if tracker is not None:
                tracker.artifact(path)
    finally:
        if tracker is not None:
            tracker.close(result.status)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def seed(value: int) -> None:
    """Seed python, and numpy and torch where they are installed."""
    random.seed(value)
    if find_spec("numpy") is not None:
        import numpy

        numpy.random.seed(value % 2**32)
    if find_spec("torch") is not None:
        import torch

        torch.manual_seed(value)


def _open_tracker(prepared: Prepared, ranks: Ranks) -> Tracker:
    from llmkit.tracking import NullTracker, open_tracker

    if not ranks.is_main:
        return NullTracker()

    recipe = prepared.recipe
    tracker: Tracker = open_tracker(recipe.tracking, output_dir=prepared.folder, name=recipe.name, stage=prepared.stage)
    tracker.params(flat(recipe))
    tracker.artifact(prepared.folder / rundir.RECIPE)
    return tracker


def flat(recipe: Recipe) -> dict[str, object]:
    """Dotted keys and values of the written recipe (in which there are no secrets); empty blocks are left out."""
    import yaml

    found: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            found[prefix] = value

    walk("", yaml.safe_load(dump(recipe)))
    return found


# Signals


@contextmanager
def listening(stop: StopFlag) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and the first Ctrl-C ask the stage to save and leave; a second Ctrl-C ends it at once.

    Signals reach the main thread only; in any other thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.request(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("Stopping with a checkpoint. Press Ctrl-C again to leave at once.", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    # Our launcher starts its processes with these blocked, so that none is killed before it can listen.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
