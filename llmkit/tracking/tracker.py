"""The tracker that a run is given: everything goes to ``log.jsonl`` at once, and to MLflow when it can."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from llmkit.context import Status, Tracker
from llmkit.recipe import TrackingSettings
from llmkit.tracking.facts import start_tags
from llmkit.tracking.flatten import flatten
from llmkit.tracking.links import run_url
from llmkit.tracking.masking import mask_tree, without_credentials
from llmkit.tracking.sender import Sender, waiting
from llmkit.tracking.spool import LOG_NAME, Spool, read
from llmkit.tracking.state import SendLock, load_state
from llmkit.tracking.system import Sampler
from llmkit.tracking.target import target_of

_FACTS_WAIT_S = 6.0
_log = logging.getLogger("llmkit.tracking")


def open_tracker(
    settings: TrackingSettings,
    *,
    output_dir: Path,
    name: str,
    stage: str,
    note: Callable[[str], None] | None = None,
) -> Tracker:
    """Start recording a run in ``output_dir``; on rank 0 only, once a run.

    Returns at once: mlflow is imported and the server called in a thread. ``note`` gets the lines a user should read
    (a server that is away, events that wait); the default logs them as warnings of ``llmkit.tracking``. Raises OSError
    when the folder cannot be written to, UsageError when its ``tracking.json`` is damaged.
    """
    return RunTracker(settings, output_dir.absolute(), name, stage, note or _log.warning)


class RunTracker:
    """See ``context.Tracker``. ``run_id`` is None until the server gave one; ``url`` is the run's page."""

    def __init__(
        self, settings: TrackingSettings, folder: Path, name: str, stage: str, note: Callable[[str], None]
    ) -> None:
        self._settings, self._folder, self._note = settings, folder, note
        self._spool = Spool(folder)
        self._state = load_state(folder)
        self._sender: Sender | None = None
        self._sampler: Sampler | None = None
        target = target_of(settings, name)
        self.run_id: str | None = (target.run_id or self._state.run_id) if settings.enabled else None
        body = {
            "name": target.name,
            "stage": stage,
            "experiment": target.experiment,
            "uri": without_credentials(target.uri),
            "tags": mask_tree(settings.tags),
        }
        self._spool.write("start", body)
        self._facts = threading.Thread(target=self._record_facts, args=(stage,), name="llmkit-facts", daemon=True)
        self._facts.start()
        if settings.system_metrics:
            self._sampler = Sampler(self.metrics, folder, began_s=_began_s(folder))
            self._sampler.start()
        if settings.enabled:
            self._sender = Sender(folder, target, self._state, note=note, on_run=self._set_run)
            self._sender.start()
        self._lock = SendLock(folder)
        if not self._sender:
            self._lock.acquire()  # a sync of a run that is not over would call it killed

    @property
    def url(self) -> str | None:
        """Link to the run's page, None until the run exists."""
        state = self._state
        if not (self._sender and state.run_id and state.experiment_id):
            return None
        return run_url(state.uri, state.experiment_id, state.run_id)

    def params(self, params: Mapping[str, object]) -> None:
        self._spool.write("params", {"params": flatten(params)})

    def tags(self, tags: Mapping[str, str]) -> None:
        self._spool.write("tags", {"tags": mask_tree({str(k): str(v) for k, v in tags.items()})})

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if metrics:
            values = {key: float(value) for key, value in metrics.items()}
            self._spool.write("metrics", {"step": int(step), "metrics": values})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or folder, which must stay where it is until it was sent."""
        self._spool.write("artifact", {"path": self._relative(path), "folder": folder}, sync=True)

    def dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, object]) -> None:
        body = {"name": name, "digest": digest, "source": source, "context": context, "profile": dict(profile)}
        masked = mask_tree(body)
        self._spool.write("dataset", masked if isinstance(masked, dict) else body)

    def model(self, path: Path, example: Mapping[str, object]) -> None:
        """Store the model when the recipe asks for it (``log_model`` or ``register``); see ``mlflow_model``."""
        settings = self._settings
        if not (settings.log_model or settings.register):
            return
        body = {
            "path": self._relative(path),
            "example": mask_tree(dict(example)),
            "register": settings.register,
            "alias": settings.alias,
        }
        self._spool.write("model", body, sync=True)

    def close(self, status: Status) -> None:
        """Record how the run ended, send what is left for a bounded time, and say what still waits."""
        if self._spool.closed:
            return
        if self._sampler:
            self._sampler.stop()
        self._facts.join(_FACTS_WAIT_S)
        self._spool.write("status", {"status": status}, sync=True)
        lost = self._spool.close()
        self._lock.release()
        if lost:
            self._note(f"{lost} events could not be written to {LOG_NAME}: the disk is full")
        if self._sender and not (self._sender.finish(quick=status == "stopped") and not self._state.failed):
            count = waiting(self._folder, self._state)
            self._note(f"{count} events wait to be sent to MLflow. Send them with: llmkit sync {self._folder}")

    def _record_facts(self, stage: str) -> None:
        self.tags(start_tags(stage))

    def _set_run(self, run_id: str) -> None:
        self.run_id = run_id

    def _relative(self, path: Path) -> str:
        """Relative to the run's folder where it lies in it, so that the folder can be moved before it is synced."""
        path = Path(path).absolute()
        return path.relative_to(self._folder).as_posix() if path.is_relative_to(self._folder) else str(path)


class NullTracker:
    """For ranks other than 0: records nothing."""

    run_id: str | None = None

    def params(self, params: Mapping[str, object]) -> None: ...
    def tags(self, tags: Mapping[str, str]) -> None: ...
    def metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None: ...
    def dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, object]) -> None: ...
    def model(self, path: Path, example: Mapping[str, object]) -> None: ...
    def close(self, status: Status) -> None: ...


def _began_s(folder: Path) -> float:
    """When the run's log begins, in seconds since the epoch."""
    return next((event.time_ms / 1000 for event in read(folder / LOG_NAME) if event.time_ms), time.time())
