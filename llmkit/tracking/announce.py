"""Make a run's MLflow run before the run begins, so that a job in a queue is seen there already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from llmkit.errors import MissingError
from llmkit.recipe import TrackingSettings
from llmkit.tracking.delivery import Away, Delivery, Gone, prepare_environment, why
from llmkit.tracking.masking import mask_tree, without_credentials
from llmkit.tracking.spool import Spool
from llmkit.tracking.state import SendLock, load_state
from llmkit.tracking.target import target_of

_log = logging.getLogger("llmkit.tracking")


def announce(
    settings: TrackingSettings,
    *,
    output_dir: Path,
    name: str,
    stage: str,
    tags: Mapping[str, str],
    note: Callable[[str], None] | None = None,
) -> str | None:
    """Write the run's beginning and ``tags`` into its log, and send them; gives the MLflow run's id.

    The run is SCHEDULED there until its process begins, which then goes on with the same run. A server that is away
    costs a line: what is in the log is sent when the run begins. None then, and where tracking is off.
    """
    note = note or _log.warning
    target = target_of(settings, name)
    spool = Spool(output_dir)
    start = {
        "name": target.name, "stage": stage, "experiment": target.experiment, "uri": without_credentials(target.uri),
        "tags": mask_tree(settings.tags),
    }  # fmt: skip
    spool.write("start", start)
    spool.write("tags", {"tags": mask_tree(dict(tags))}, sync=True)
    spool.close()
    if not settings.enabled:
        return None
    lock = SendLock(output_dir)
    if not lock.acquire():
        return None
    state = load_state(output_dir)
    delivery = Delivery(output_dir, target, state, note)
    try:
        delivery.connect()
        while delivery.send_some():
            pass
        delivery.mark_scheduled()
    except (Away, Gone, MissingError) as error:
        note(f"MLflow cannot be reached ({error}). The job is submitted; its run appears there when it begins")
    finally:
        lock.release()
    return state.run_id


def tag_run(settings: TrackingSettings, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of an MLflow run at once. A server that is away costs a line."""
    target = target_of(settings, "")
    prepare_environment(target.uri)
    try:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=target.uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
    except Exception as error:  # noqa: BLE001  whatever a store's driver raises: the job runs without the tag
        _log.warning("the MLflow run was not told its job: %s", why(error))
