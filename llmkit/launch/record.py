"""``job.json`` in a run's folder: which job of which scheduler the run is. No daemon and no database know more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from llmkit import rundir, uris
from llmkit.errors import UsageError

RECORD = "job.json"

State = Literal["queued", "running", "done", "failed", "cancelled", "timed_out", "preempted"]
FINAL: frozenset[State] = frozenset({"done", "failed", "cancelled", "timed_out", "preempted"})


@dataclass(frozen=True)
class Place:
    """Where a scheduler has put a job: its ``id`` there, and what else the launcher needs to find it again."""

    id: str
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobStatus:
    """``reason`` is the scheduler's, in words; ``exit_code`` is the job's, where there is one."""

    state: State
    reason: str = ""
    exit_code: int | None = None
    restarts: int = 0

    @property
    def final(self) -> bool:
        return self.state in FINAL


@dataclass(frozen=True)
class Record:
    """``id`` is empty between the decision to submit and the scheduler's answer; ``token`` finds the job then."""

    launcher: str
    token: str
    name: str
    stage: str
    output_dir: Path
    submitted_at: str
    id: str = ""
    where: Mapping[str, str] = field(default_factory=dict)
    earlier: tuple[str, ...] = ()
    """Ids of the jobs that this run was before."""
    uri: str = ""
    """The run's folder where it is in an object store; ``output_dir`` is then this machine's scratch folder."""

    def placed(self, place: Place) -> Record:
        return replace(self, id=place.id, where=dict(place.where))

    def write(self) -> None:
        data = asdict(self) | {"output_dir": str(self.output_dir)}
        rundir.write_atomic(self.output_dir / RECORD, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(folder: Path) -> Record | None:
    """The record in a run's folder, wherever it was moved to; None where there is none. ``UsageError`` for a damaged one."""
    path = folder / RECORD
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Record)}
        kept = {key: value for key, value in data.items() if key in known}
        return Record(**kept | {"output_dir": folder, "earlier": tuple(kept.get("earlier", ()))})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}). Remove it to forget the job.") from error


def find_all(folder: Path, depth: int = 3) -> Iterator[Record]:
    """The records in and under a folder, by their paths."""
    pattern = ["/".join(["*"] * level + [RECORD]) for level in range(depth + 1)]
    for path in sorted({path for one in pattern for path in folder.glob(one)}):
        record = read(path.parent)
        if record is not None:
            yield record


def resolve(job: str, under: Path) -> Record:
    """The record that a user means: a run's folder, or a scheduler's id of a run under ``under``."""
    folder = uris.workplace(job) if uris.is_uri(job) else Path(job).expanduser()
    if folder.name == RECORD:
        folder = folder.parent
    if folder.is_dir():
        record = read(folder.absolute())
        if record is None:
            raise UsageError(f"{job} has no {RECORD}: its run was not submitted to a scheduler.")
        return record
    found = [record for record in find_all(under) if job in (record.id, *record.earlier)] if under.is_dir() else []
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{job} is the id of several jobs: {', '.join(str(r.output_dir) for r in found)}. Give the folder."
        )
    raise UsageError(f"There is no run folder {job}, and no job of that id under {under}. See: llmkit jobs list")
