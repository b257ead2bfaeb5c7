"""Recording of runs: a log on disk before everything, MLflow behind it. Importing this loads neither mlflow nor torch."""

from llmkit.tracking.announce import announce, tag_run
from llmkit.tracking.flatten import flatten
from llmkit.tracking.links import run_url, ui_command
from llmkit.tracking.masking import mask, mask_command, mask_tree
from llmkit.tracking.spool import read_metrics
from llmkit.tracking.sync import SyncReport, sync
from llmkit.tracking.tracker import NullTracker, RunTracker, open_tracker

__all__ = [
    "NullTracker",
    "RunTracker",
    "SyncReport",
    "announce",
    "flatten",
    "mask",
    "mask_command",
    "mask_tree",
    "open_tracker",
    "read_metrics",
    "run_url",
    "sync",
    "tag_run",
    "ui_command",
]
