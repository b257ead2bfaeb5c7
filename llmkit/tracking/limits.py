"""MLflow's limits, and how names and values are made to fit them; the full values go to ``params_full.json``.

The figures are those of mlflow 3.17 (mlflow/utils/validation.py). A server that allows less says so, and gets the value
cut to ``SMALLEST``.
"""

from __future__ import annotations

import hashlib
import json
import re

KEY = 250
PARAM = 6000
TAG = 8000
METRICS_PER_CALL = 1000
PAIRS_PER_CALL = 100
BYTES_PER_CALL = 900_000
DATASET_DIGEST = 36
DATASET_NAME = 500
DATASET_SOURCE = 65_535
SMALLEST = 250
FULL_NAME = "params_full.json"

_NOT_ALLOWED = re.compile(r"[^/\w.\- :]")


def clean_key(key: str) -> str:
    """A name that MLflow takes; one that had to change ends in a short hash, so that two never become one."""
    clean = "/".join(part for part in _NOT_ALLOWED.sub("_", key).split("/") if part not in ("", ".", ".."))
    if key and clean == key and len(key) <= KEY:
        return key
    mark = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{clean[: KEY - 9] or 'unnamed'}~{mark}".replace("~", "-")


def shorten(value: str, limit: int) -> str:
    """``value`` in at most ``limit`` characters; a cut one ends by saying where the rest is."""
    if len(value) <= limit:
        return value
    note = f"… [{len(value)} characters, whole in {FULL_NAME}]"
    return value[: limit - len(note)] + note


def fits(key: str, value: str, limit: int) -> bool:
    return clean_key(key) == key and len(value) <= limit


def wire_size(*texts: str) -> int:
    """Bytes that texts take in a request, where JSON writes a character outside ASCII in six or twelve."""
    return sum(len(json.dumps(text)) for text in texts) + 60
