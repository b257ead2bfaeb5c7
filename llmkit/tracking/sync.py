"""``llmkit sync RUN``: send what a run's log holds and its server has not got."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import MissingError, UsageError
from llmkit.tracking.delivery import Away, Delivery, Gone
from llmkit.tracking.links import run_url
from llmkit.tracking.masking import without_credentials
from llmkit.tracking.sender import waiting
from llmkit.tracking.spool import LOG_NAME, Event, read, repair
from llmkit.tracking.state import SendLock, State, load_state
from llmkit.tracking.target import target_of_folder

_log = logging.getLogger("llmkit.tracking")
_OWN_THREAD_S = 3.0


@dataclass(frozen=True)
class SyncReport:
    """``sent`` and ``left`` count events; ``left`` are those that MLflow refused, named by the notes."""

    sent: int
    left: int
    run_id: str
    url: str


def sync(run_dir: Path, uri: str | None = None, *, note: Callable[[str], None] | None = None) -> SyncReport:
    """Send a run folder's waiting events; ``uri`` sends to another store, from the start of the log.

    A run whose process was killed is set to KILLED. Raises UsageError when the folder is no run or its run is still
    being sent by another process, MissingError when the server cannot be reached or mlflow is not installed.
    """
    folder = Path(run_dir).absolute()
    if not (folder / LOG_NAME).is_file():
        raise UsageError(f"{run_dir} is no run of llmkit: it has no {LOG_NAME}. Name the run's output folder.")
    lock = SendLock(folder)
    if not _acquire(lock):
        raise UsageError(
            f"process {lock.holder()} is still sending {run_dir} to MLflow; it needs no sync while it runs."
        )
    try:
        return _sync(folder, uri, note or _log.warning)
    finally:
        lock.release()


def _acquire(lock: SendLock) -> bool:
    """Take the lock; a thread of this very process that was told to stop gets a moment to let go of it."""
    end = time.monotonic() + _OWN_THREAD_S
    while not lock.acquire():
        if lock.holder() != str(os.getpid()) or time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _sync(folder: Path, uri: str | None, note: Callable[[str], None]) -> SyncReport:
    repair(folder / LOG_NAME)
    state = load_state(folder)
    target = target_of_folder(folder, state, uri)
    if state.uri and without_credentials(target.uri) != state.uri:
        state = State()
    before = waiting(folder, state)
    delivery = Delivery(folder, target, state, note)
    try:
        _deliver(delivery, state)
        last = _last_event(folder)
        if last is not None and last.kind != "status":
            delivery.mark_killed(last.time_ms)
    except Away as error:
        raise MissingError(
            f"MLflow at {without_credentials(target.uri)} cannot be reached ({error}). "
            f"{waiting(folder, state)} events wait; run `llmkit sync {folder}` again when it is back."
        ) from error
    left = waiting(folder, state)
    run_id, experiment_id = str(state.run_id), str(state.experiment_id)
    return SyncReport(max(0, before - left), left, run_id, run_url(target.uri, experiment_id, run_id))


def _deliver(delivery: Delivery, state: State) -> None:
    """Everything that waits, the refused events last; once more from the start when the run was deleted meanwhile."""
    for _ in range(2):
        try:
            delivery.connect()
            while delivery.send_some():
                pass
            if state.failed:
                delivery.retry_failed()
            return
        except Gone:
            delivery.disconnect()
    raise Away("the run is deleted on the server again and again")


def _last_event(folder: Path) -> Event | None:
    last = None
    for event in read(folder / LOG_NAME):
        if event.kind != "damaged":
            last = event
    return last
