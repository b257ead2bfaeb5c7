"""What a stage may use of the outside world, and what it gives back."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, Protocol

Status = Literal["done", "failed", "stopped"]


@dataclass(frozen=True)
class Result:
    """Outcome of a stage; ``result.json`` holds it, and a notebook gets it back.

    ``metrics`` are plain floats by name; ``artifacts`` name files and folders of the run, relative to
    ``output_dir``; ``samples`` are answers before and after: ``prompt``, ``reference``, ``before``, ``after``.
    ``exit_code``, ``finished_at`` (UTC, ISO 8601) and ``uri`` (the run's folder, where it is in an object store) are
    filled in by the runner.
    """

    stage: str
    name: str
    output_dir: Path
    status: Status = "done"
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()
    run_id: str | None = None
    error: str | None = None
    exit_code: int = 0
    finished_at: str | None = None
    uri: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"output_dir": str(self.output_dir)}, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The inverse of ``to_json``. ``ValueError`` or ``TypeError`` where the text is not a result."""
        data = json.loads(text)
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known} | {"output_dir": Path(data["output_dir"])})


class Tracker(Protocol):
    """Where a run is recorded. No call blocks on a network or raises because a server is away."""

    run_id: str | None

    def params(self, params: Mapping[str, object]) -> None: ...
    def tags(self, tags: Mapping[str, str]) -> None: ...
    def metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or a folder of the run; ``folder`` is where it lands in the run's artifacts."""

    def dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, object]) -> None:
        """Record an input; ``context`` is ``train`` or ``eval``, ``profile`` e.g. rows and tokens."""

    def model(self, path: Path, example: Mapping[str, object]) -> None:
        """Store (and register, as the recipe says) a finished model folder with a signature."""

    def close(self, status: Status) -> None: ...


class Task(Protocol):
    def advance(self, n: int = 1) -> None: ...


class Progress(Protocol):
    """What a person sees on the terminal (or in the log) while a stage works; rank 0 only."""

    def note(self, text: str) -> None:
        """A line worth keeping, such as a decision taken for the user."""

    def task(self, what: str, total: int | None = None, unit: str = "rows") -> AbstractContextManager[Task]:
        """Long work with a bar, rate and time left."""

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Called after every training step: updates the live line, cheap."""

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Called every ``logging_steps``: one plain line where there is no terminal."""


class StopFlag:
    """Set by a signal or a time limit; a stage looks at it between steps and saves before it leaves."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def request(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()


class Outbox(Protocol):
    """Where a run's finished files go when its folder is in an object store; see ``llmkit.mirror``.

    The first process of every machine has one. No call but ``fetch`` waits for the store.
    """

    def publish(self, path: Path, *, divided: bool = False) -> None: ...
    def publish_part(self, path: Path, unit: Path) -> None:
        """``path`` holds what another machine than the first has of ``unit``, which the first publishes as ``divided``."""

    def retire(self, path: Path) -> None: ...
    def published(self, folder: Path) -> list[Path]:
        """What is in the store below ``folder``, or will be; it need not be on this machine."""

    def fetch(self, path: Path) -> None:
        """Have a published file or folder on this machine. Raises StoreError where it does not become complete."""


@dataclass(frozen=True)
class RunContext:
    """Given to a stage's ``run``. ``resume`` is ``auto``, ``never`` or the path of a checkpoint; ``outbox`` is None where
    the run's folder is on this machine's own file system."""

    output_dir: Path
    tracker: Tracker
    progress: Progress
    stop: StopFlag
    resume: str = "auto"
    rank: int = 0
    world_size: int = 1
    outbox: Outbox | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def publish(self, path: Path, *, divided: bool = False) -> None:
        """Say, on rank 0, that a file or folder of the run is finished: it is uploaded beside the run where the run's
        folder is in an object store. It may be removed afterwards, never changed. ``divided``: every machine has files
        of it (``Outbox.publish_part``)."""
        if self.outbox is not None:
            self.outbox.publish(path, divided=divided)
