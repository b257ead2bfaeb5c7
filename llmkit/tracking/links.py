"""Where a run can be looked at: the link to its MLflow page, and the command that opens the page."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from llmkit.tracking.masking import without_credentials

DEFAULT_DATABASE = "mlflow.db"
LOCAL_PAGE = "http://127.0.0.1:5000"


def default_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else the sqlite file in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_DATABASE}"


def absolute_uri(uri: str) -> str:
    """A relative sqlite file or folder made absolute, so that it means the same from any directory."""
    if uri.startswith("sqlite:///"):
        path, question, query = uri.removeprefix("sqlite:///").partition("?")
        return uri if path in ("", ":memory:") else f"sqlite:///{Path(path).absolute()}{question}{query}"
    if "://" not in uri and not uri.startswith(("file:", "databricks")):
        return Path(uri).absolute().as_uri()
    return uri


def is_file_store(uri: str) -> bool:
    return urlsplit(uri).scheme == "file"


def is_remote(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment of a sqlite store keeps its files: ``mlruns/<experiment>`` beside the database.

    None leaves the choice to MLflow (a server, another database, a file store).
    """
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    folder = "".join(c if c.isalnum() or c in "-_." else "_" for c in experiment).strip(".") or "experiment"
    return (database.parent / "mlruns" / folder).as_uri()


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of a run; for a local store it is the page that ``ui_command`` opens."""
    base = without_credentials(uri).rstrip("/") if is_remote(uri) else LOCAL_PAGE
    return f"{base}/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"


def ui_command(uri: str | None = None) -> str:
    """What to type to see the runs: a command for a local store, for a server where to look."""
    uri = absolute_uri(uri or default_uri())
    if is_remote(uri):
        return f"open {without_credentials(uri)}"
    return f"mlflow server --backend-store-uri {_short(uri)} --port 5000"


def _short(uri: str) -> str:
    """The same store, relative to the working directory where it lies under it."""
    for prefix in ("sqlite:///", "file://"):
        if uri.startswith(prefix):
            text = uri.removeprefix(prefix)
            path = Path(text if prefix == "sqlite:///" else unquote(text))
            if path.is_relative_to(Path.cwd()):
                relative = path.relative_to(Path.cwd())
                return f"sqlite:///{relative}" if prefix == "sqlite:///" else f"./{relative}"
    return without_credentials(uri)
