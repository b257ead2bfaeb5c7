"""``tracking.json`` (how far the log was sent, and to which run) and the lock that lets one process send at a time."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError

STATE_NAME = "tracking.json"
LOCK_NAME = ".tracking.lock"


@dataclass
class State:
    """``sent`` is the byte offset in ``log.jsonl`` up to which everything arrived (but for ``failed``).

    ``failed`` holds ``{"offset", "what", "reason"}`` of artifacts and models that the server or the disk refused;
    ``models`` what exists already of a model event, by its offset, so that a resend finishes it instead of making
    another. ``uri`` carries no credentials. ``run_key`` is a tag of the run, by which a creation whose answer was lost
    is found again. ``lost_run_id`` is a run asked for by ``MLFLOW_RUN_ID`` that the server does not have.
    """

    sent: int = 0
    run_id: str | None = None
    run_key: str = ""
    lost_run_id: str | None = None
    experiment: str = ""
    experiment_id: str | None = None
    uri: str = ""
    failed: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, dict[str, str]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``tracking.json`` whole or not at all."""
        beside = folder / f"{STATE_NAME}.tmp"
        with beside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.write("\n")
        beside.replace(folder / STATE_NAME)


def load_state(folder: Path) -> State:
    """The state of a run folder, a fresh one if there is none. Raises UsageError when the file is damaged."""
    path = folder / STATE_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return State(**{f.name: found[f.name] for f in fields(State) if f.name in found})
    except FileNotFoundError:
        return State()
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}). Delete it to send the run again from its start.") from error


class SendLock:
    """Held by the process that sends a run folder's events; the system frees it when that process dies."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._file: int | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting; False when another process has it."""
        if self._file is not None:
            return True
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        self._file = file
        return True

    def holder(self) -> str:
        """Process number of whoever holds the lock, as far as known."""
        try:
            return self._path.read_text().strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
