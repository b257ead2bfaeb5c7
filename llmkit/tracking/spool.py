"""``log.jsonl``: every event of a run, one JSON object a line, on disk before anything is sent anywhere.

A line is written by one ``write`` call, so ``kill -9`` leaves at most one half line, at the end, and only when the disk
was full or the machine went down. A half line is closed when the file is opened again, and readers pass over it.
``NaN`` and the infinities are written as the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, to keep the file
strict JSON.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_log = logging.getLogger("llmkit.tracking")


@dataclass(frozen=True)
class Event:
    """One line. ``start`` and ``end`` are byte offsets; ``kind`` is ``damaged`` for a line that is no JSON object."""

    kind: str
    time_ms: int
    body: Mapping[str, Any]
    start: int
    end: int


def number_to_json(value: float) -> float | str:
    """A float that strict JSON can hold."""
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def number_from_json(value: float | str) -> float:
    return _SPECIAL[value] if isinstance(value, str) else float(value)


def finite(value: object) -> object:
    """A tree whose floats strict JSON can hold, see ``number_to_json``."""
    if isinstance(value, float):
        return number_to_json(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _time_ms(text: object) -> int:
    return round(datetime.fromisoformat(str(text)).timestamp() * 1000)


class Spool:
    """Append-only writer of ``log.jsonl``; safe to use from several threads of one process."""

    def __init__(self, folder: Path) -> None:
        """Open (and repair) the log of ``folder``. Raises OSError when the folder cannot be written to."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        if repair(self.path):
            _log.warning(
                "%s ended in a half-written line (the process was killed): it is kept and passed over", self.path
            )
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        self._torn = False
        self._lost = 0
        self.closed = False

    def write(self, kind: str, body: Mapping[str, object], *, sync: bool = False) -> None:
        """Append one event. A disk that is full costs events, with a warning, and never the training."""
        event = finite({"time": _now(), "event": kind} | dict(body))
        line = json.dumps(event, ensure_ascii=False, allow_nan=False, default=str)
        with self._lock:
            if self.closed:
                return
            data = (("\n" if self._torn else "") + line + "\n").encode("utf-8", "replace")
            try:
                self._torn = os.write(self._file, data) != len(data)
                if sync:
                    os.fsync(self._file)
            except OSError as error:
                self._torn, self._lost = True, self._lost + 1
                if self._lost == 1:
                    _log.warning("%s cannot be written: %s. Metrics are being lost, training goes on", self.path, error)
                return
            if self._torn:
                self._lost += 1
                _log.warning("%s: the disk is full, an event was lost", self.path)

    def close(self) -> int:
        """Flush to the disk; gives the number of events that could not be written."""
        with self._lock:
            if not self.closed:
                self.closed = True
                try:
                    os.fsync(self._file)
                finally:
                    os.close(self._file)
        return self._lost


def repair(path: Path) -> bool:
    """Close a half-written last line with a newline; True when that line is no valid event."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return False
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
    with path.open("rb") as file:
        (last,) = deque(file, maxlen=1)
    return _parse(last, 0).kind == "damaged"


def read(path: Path, offset: int = 0) -> Iterator[Event]:
    """Events from a byte offset on; a last line without its newline is still being written and is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            event = _parse(line, offset)
            offset = event.end
            if line.strip():
                yield event


def _parse(line: bytes, start: int) -> Event:
    end = start + len(line)
    try:
        body = json.loads(line)
        return Event(str(body["event"]), _time_ms(body["time"]), body, start, end)
    except (ValueError, KeyError, TypeError):
        return Event("damaged", 0, {"line": line.decode("utf-8", "replace")}, start, end)


def read_metrics(folder: Path) -> Iterator[tuple[int, int, dict[str, float]]]:
    """``(step, time in ms, metrics)`` of every metrics line of a run, in the order they were written."""
    for event in read(folder / LOG_NAME):
        if event.kind == "metrics":
            yield event.body["step"], event.time_ms, {k: number_from_json(v) for k, v in event.body["metrics"].items()}
