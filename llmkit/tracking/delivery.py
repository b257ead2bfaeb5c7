"""From events in ``log.jsonl`` to calls of MLflow. Used by the sender thread of a run and by ``llmkit sync``.

Whatever happens between a call and the note in ``tracking.json`` that it was made, doing it again changes nothing:
SQL stores (and servers on top of one) keep ``(key, time, step, value)`` of a metric once, tags and files are
overwritten, equal params are accepted. File stores do append, so after every (re)connection to a store that may be one,
the points of the first batch are compared with what the run already has.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.errors import MissingError
from llmkit.tracking import limits
from llmkit.tracking.batches import Batch, Point, collect, dataset_fields
from llmkit.tracking.links import artifact_location, is_file_store, is_remote
from llmkit.tracking.masking import mask, without_credentials
from llmkit.tracking.spool import LOG_NAME, Event, read
from llmkit.tracking.state import State
from llmkit.tracking.target import RUN_KEY_TAG, Target

MLFLOW_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_ATTEMPTS = 3
_SLOWEST_BYTES_PER_S = 1e6
_REJECTIONS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "MALFORMED_REQUEST",
    "INVALID_STATE",
    "RESOURCE_DOES_NOT_EXIST",
}
_OWN_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_own_timeout = False


class Away(Exception):  # noqa: N818  a state of the world, not a fault
    """The server or store cannot be used now; trying again later may work."""


class Rejected(Exception):  # noqa: N818
    """The server answered that it will never take this."""


class Gone(Exception):  # noqa: N818
    """The run was deleted on the server."""


def prepare_environment(uri: str) -> None:
    """Short HTTP waits (this module repeats calls itself) and no telemetry, unless the user set them."""
    global _own_timeout
    _own_timeout = _own_timeout or "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    for name, value in _OWN_HTTP.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
    if is_file_store(uri):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def why(error: BaseException) -> str:
    """An error in one masked line, short enough for a terminal."""
    text = " ".join(mask(str(error) or type(error).__name__).split())
    return text if len(text) <= 240 else text[:237] + "…"


class Delivery:
    """Sends the events of one run folder. Not thread-safe: one thread owns it.

    ``last_progress`` (monotonic seconds) and ``patience_s`` (how long what is being done now may take without a sign
    of life) are for whoever waits for it.
    """

    def __init__(self, folder: Path, target: Target, state: State, note: Callable[[str], None]) -> None:
        self.folder, self.target, self.state, self._note = folder, target, state, note
        self.last_progress = time.monotonic()
        self.patience_s = 5.0 if is_remote(target.uri) else 15.0
        self._client: Any = None
        self._params: dict[str, str] = {}
        self._doubtful = False
        self._attempts: dict[int, int] = {}

    @property
    def connected(self) -> bool:
        return self._client is not None

    def disconnect(self) -> None:
        self._client = None

    # -- connection and run -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Import mlflow, find or make experiment and run. Raises Away, or MissingError without mlflow."""
        if self._client is not None:
            return
        with self._patience(60.0):
            prepare_environment(self.target.uri)
            try:
                from mlflow import MlflowClient
            except ImportError as error:
                raise MissingError.extra("mlflow", "train") from error
            for name in ("mlflow.store.db.utils", "alembic", "alembic.runtime.migration"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._moved()
        with self._patience(5.0 if is_remote(self.target.uri) else 60.0), self._translated():
            client = MlflowClient(tracking_uri=self.target.uri, registry_uri=self.target.registry_uri)
            self._open_run(client)
            self._client = client
            self._moved()

    def _open_run(self, client: Any) -> None:
        state = self.state
        state.uri = without_credentials(self.target.uri)
        asked = self.target.run_id if self.target.run_id != state.lost_run_id else None
        wanted = asked or state.run_id
        if wanted and wanted != state.run_id:
            state.sent, state.failed, state.models = 0, [], {}
        run = self._find_run(client, wanted) if wanted else None
        if run is None and wanted:
            self._note(f"MLflow run {wanted} is not on the server any more (deleted?): a new run gets the whole log")
            state.lost_run_id = asked
            state.sent, state.failed, state.models, state.run_key = 0, [], {}, ""
        created = run is None
        if run is None:
            run = self._create_run(client)
        state.run_id, state.experiment_id = run.info.run_id, run.info.experiment_id
        state.experiment = state.experiment or self.target.experiment
        state.save(self.folder)
        self._params = dict(run.data.params)
        self._doubtful = not created and (is_remote(self.target.uri) or is_file_store(self.target.uri))

    def _find_run(self, client: Any, run_id: str) -> Any:
        """The run, None when it was deleted."""
        try:
            with self._translated():
                run = client.get_run(run_id)
        except Rejected:
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _create_run(self, client: Any) -> Any:
        """A new run, or the one that an earlier attempt made whose answer never came."""
        state, target = self.state, self.target
        experiment_id = self._experiment(client)
        if state.run_key:
            found = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{state.run_key}'", max_results=1)
            if found:
                return found[0]
        state.run_key = state.run_key or uuid.uuid4().hex
        state.save(self.folder)
        tags = {RUN_KEY_TAG: state.run_key, "mlflow.source.type": "LOCAL"}
        began = next((e.time_ms for e in read(self.folder / LOG_NAME) if e.kind == "start"), None)
        return client.create_run(
            experiment_id, start_time=began, tags=tags, run_name=limits.shorten(target.name, limits.TAG)
        )

    def _experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        name = self.target.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location=artifact_location(self.target.uri, name)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise Away(
                f"experiment {name!r} was deleted. Restore it with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or name another: tracking.experiment"
            )
        return str(found.experiment_id)

    # -- events -------------------------------------------------------------------------------------------------------

    def send_some(self) -> int:
        """Send the next batch or the next single event; gives how many events were dealt with, 0 when none waits."""
        events = collect(read(self.folder / LOG_NAME, self.state.sent))
        if not events:
            return 0
        try:
            self._send_or_note(events)
        except Gone:
            self._client = None
            raise Away("the run was deleted on the server while it was running") from None
        self.state.sent = events[-1].end
        self.state.save(self.folder)
        self._moved()
        return len(events)

    def _send_or_note(self, events: Sequence[Event]) -> None:
        try:
            self._send(events)
        except Rejected as error:
            self._still_there()
            self._failed(events[0].start, events[0].kind, error)

    def retry_failed(self) -> None:
        """Try again what was refused earlier; what is refused again stays in ``state.failed``."""
        waiting, self.state.failed, self._attempts = self.state.failed, [], {}
        for position, entry in enumerate(waiting):
            try:
                self._send_or_note([next(read(self.folder / LOG_NAME, entry["offset"]))])
            except (Away, Gone):
                self.state.failed += waiting[position:]
                self.state.save(self.folder)
                raise
        self.state.save(self.folder)

    def mark_killed(self, time_ms: int) -> None:
        """The run's process ended without saying how."""
        with self._translated():
            self._client.set_terminated(self.state.run_id, "KILLED", time_ms)

    def mark_scheduled(self) -> None:
        """The run's process has not begun."""
        with self._translated():
            self._client.update_run(self.state.run_id, status="SCHEDULED")

    def _send(self, events: Sequence[Event]) -> None:
        first = events[0]
        if first.kind in ("metrics", "params", "tags", "start"):
            self._send_batch(Batch.of(events))
        elif first.kind == "status":
            with self._translated():
                self._client.set_terminated(self.state.run_id, MLFLOW_STATUS[first.body["status"]], first.time_ms)
        elif first.kind == "dataset":
            self._optional(first, f"data set {first.body['name']}", lambda: self._send_dataset(first.body))
        elif first.kind == "artifact":
            self._optional(first, f"artifact {first.body['path']}", lambda: self._send_artifact(first.body))
        elif first.kind == "model":
            self._optional(first, f"model {first.body['path']}", lambda: self._send_model(first))
        elif first.kind == "damaged":
            self._note(f"{LOG_NAME} at byte {first.start}: a line that is no event was passed over")

    def _send_batch(self, batch: Batch) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if batch.started:
            self._set_running()
        params, changed = batch.new_params(self._params)
        tags = batch.tags | changed
        if changed:
            self._note(f"MLflow keeps the first value of a parameter; changed ones became tags: {', '.join(changed)}")
        points = self._not_there_yet(batch.points) if self._doubtful else batch.points
        for points_part in _parts(points, limits.METRICS_PER_CALL, lambda p: limits.wire_size(p.key)):
            self._log(batch, "metrics", [Metric(p.key, p.value, p.time_ms, p.step) for p in points_part])
        for pairs in _parts(list(params.items()), limits.PAIRS_PER_CALL, lambda kv: limits.wire_size(*kv)):
            self._log(batch, "params", [Param(k, v) for k, v in pairs])
            self._params |= dict(pairs)
        for pairs in _parts(list(tags.items()), limits.PAIRS_PER_CALL, lambda kv: limits.wire_size(*kv)):
            self._log(batch, "tags", [RunTag(k, v) for k, v in pairs])
        self._doubtful = False
        if batch.cut:
            self._send_full_values()

    def _set_running(self) -> None:
        try:
            with self._translated():
                self._client.update_run(self.state.run_id, status="RUNNING")
        except Rejected as error:
            self._still_there()
            self._note(f"the run could not be set to RUNNING: {why(error)}")

    def _log(self, batch: Batch, what: str, items: list[Any]) -> None:
        """One call; a refused one is halved until the items that are refused stand alone."""
        try:
            with self._translated():
                self._client.log_batch(self.state.run_id, **{what: items})
            self._moved()
        except Rejected as error:
            self._still_there()
            if len(items) > 1:
                middle = len(items) // 2
                self._log(batch, what, items[:middle])
                self._log(batch, what, items[middle:])
            elif what != "metrics" and len(items[0].value) > limits.SMALLEST:
                batch.cut = True
                self._log(batch, what, [type(items[0])(items[0].key, limits.shorten(items[0].value, limits.SMALLEST))])
            else:
                offset = batch.origin.get((what, items[0].key), self.state.sent)
                self._failed(offset, f"{what[:-1]} {items[0].key}", error)

    def _not_there_yet(self, points: Sequence[Point]) -> list[Point]:
        there: set[tuple[str, int, int, str]] = set()
        with self._translated():
            for key in {p.key for p in points}:
                history = self._client.get_metric_history(self.state.run_id, key)
                there |= {(m.key, m.timestamp, m.step, repr(float(m.value))) for m in history}
        return [p for p in points if (p.key, p.time_ms, p.step, repr(p.value)) not in there]

    def _send_full_values(self) -> None:
        """``params_full.json``: every param and tag of the log so far, uncut, by its own name."""
        full: dict[str, dict[str, str]] = {"params": {}, "tags": {}}
        for event in read(self.folder / LOG_NAME):
            for what in full:
                full[what] |= event.body.get(what, {}) if event.kind in ("params", "tags", "start") else {}
        with self._translated():
            self._client.log_dict(self.state.run_id, full, limits.FULL_NAME)

    def _send_dataset(self, body: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        fields, context = dataset_fields(body)
        tags = [InputTag("mlflow.data.context", context)]
        self._client.log_inputs(self.state.run_id, [DatasetInput(Dataset(**fields), tags)])

    def _send_artifact(self, body: Mapping[str, Any]) -> None:
        path = self.folder / body["path"]
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            inside = file.parent.relative_to(path.parent).as_posix() if path.is_dir() else ""
            target = "/".join(part for part in (body.get("folder", ""), inside) if part not in ("", "."))
            with self._patience(30.0 + file.stat().st_size / _SLOWEST_BYTES_PER_S):
                self._client.log_artifact(self.state.run_id, str(file), target or None)
            self._moved()

    def _send_model(self, event: Event) -> None:
        from llmkit.tracking.mlflow_model import log_model

        path = self.folder / event.body["path"]
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        known = self.state.models.setdefault(str(event.start), {})
        with self._patience(120.0 + 3 * size / _SLOWEST_BYTES_PER_S):
            log_model(
                self._client,
                self.state,
                path,
                event.body,
                known,
                lambda: self.state.save(self.folder),
                key=str(event.start),
            )

    # -- faults -------------------------------------------------------------------------------------------------------

    def _optional(self, event: Event, what: str, send: Callable[[], None]) -> None:
        """A failure that the server or disk insists on is noted and kept, so that it holds up nothing behind it."""
        try:
            with self._translated():
                send()
        except Rejected as error:
            self._still_there()
            self._failed(event.start, what, error)
        except Away as error:
            self._attempts[event.start] = self._attempts.get(event.start, 0) + 1
            if self._attempts[event.start] < _ATTEMPTS:
                raise
            self._still_there()
            self._failed(event.start, what, error)

    def _failed(self, offset: int, what: str, error: BaseException) -> None:
        self.state.failed.append({"offset": offset, "what": what, "reason": why(error)})
        self._note(f"{what} was not taken by MLflow: {why(error)}. `llmkit sync {self.folder}` tries again")

    def _still_there(self) -> None:
        """Raises Gone when the run was deleted, Away when the server does not answer."""
        if self._find_run(self._client, str(self.state.run_id)) is None:
            raise Gone

    def _moved(self) -> None:
        self.last_progress = time.monotonic()

    @contextmanager
    def _patience(self, seconds: float) -> Iterator[None]:
        """What follows may take so long; HTTP waits (if ours) are made longer with it, for large files."""
        before, self.patience_s = self.patience_s, seconds
        if longer := _own_timeout and seconds > 60:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(round(seconds))
        try:
            yield
        finally:
            self.patience_s = before
            if longer:
                os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = _OWN_HTTP["MLFLOW_HTTP_REQUEST_TIMEOUT"]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of mlflow, requests and the disk as Away or Rejected."""
        import requests
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (Away, Rejected, Gone, MissingError):
            raise
        except MlflowException as error:
            raise (Rejected if error.error_code in _REJECTIONS else Away)(why(error)) from error
        except requests.HTTPError as error:
            refused = error.response is not None and error.response.status_code in (400, 404, 413)
            raise (Rejected if refused else Away)(why(error)) from error
        except (FileNotFoundError, PermissionError, ImportError, ValueError, TypeError) as error:
            raise Rejected(why(error)) from error
        except Exception as error:  # whatever a store's driver raises: the events stay on disk, so waiting is safe
            raise Away(why(error)) from error


def _parts(items: Sequence[Any], count: int, size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Runs of at most ``count`` items and about ``BYTES_PER_CALL`` bytes."""
    part: list[Any] = []
    bytes_used = 0
    for item in items:
        if part and (len(part) == count or bytes_used + size(item) > limits.BYTES_PER_CALL):
            yield part
            part, bytes_used = [], 0
        part.append(item)
        bytes_used += size(item)
    if part:
        yield part
