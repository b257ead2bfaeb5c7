"""What past runs on this machine needed, beside what was predicted: one line a run, in a folder of the user's.

The folder is ``LLMKIT_CACHE``, else ``XDG_CACHE_HOME/llmkit``, else ``~/.cache/llmkit``. Recording never fails a run.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmkit.files import cache_folder

FILE = "memory.jsonl"
_NEWEST = 200


@dataclass(frozen=True)
class Record:
    """One finished training run. Bytes of one process; ``base`` is what it held before the model was loaded.

    ``flops`` are those reached by one process, ``versions`` those of the libraries, ``key`` what kind of run it was.
    """

    at: str
    name: str
    device: str
    cpu: bool
    processes: int
    sharding: str
    kind: str
    parameters: int
    predicted_host: float
    measured_host: float
    predicted_device: float | None
    measured_device: float | None
    base: float
    flops: float
    versions: dict[str, str]

    @property
    def error(self) -> float:
        """Relative error of the prediction that mattered: the GPU's memory, or without one the process's."""
        if self.measured_device and self.predicted_device is not None:
            return self.predicted_device / self.measured_device - 1
        return self.predicted_host / self.measured_host - 1


def append(record: Record) -> None:
    """Add a line; whatever goes wrong (no home, a full disk) is not the run's business."""
    line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
    try:
        where = cache_folder()
        where.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(where / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())  # one write at the end of the file: lines of two runs do not mix
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError):
        return


def read() -> list[Record]:
    """The newest records, oldest first; lines that are not whole are passed over."""
    try:
        lines = (cache_folder() / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, RuntimeError):
        return []
    names = {f.name for f in fields(Record)}
    found = []
    for line in lines[-_NEWEST:]:
        try:
            data: dict[str, Any] = json.loads(line)
            record = Record(**{key: value for key, value in data.items() if key in names})
            if record.measured_host > 0 and record.predicted_host > 0:
                found.append(record)
        except (ValueError, TypeError, AttributeError):
            continue
    return found


def of_device(records: Sequence[Record], device: str) -> list[Record]:
    return [record for record in records if record.device == device]


@dataclass(frozen=True)
class Accuracy:
    """How far past predictions were off: mean of the absolute errors, the worst one of each sign; shares of the measured."""

    runs: int
    mean: float
    highest: float
    lowest: float


def accuracy(records: Sequence[Record]) -> Accuracy | None:
    """None without a record."""
    errors = [record.error for record in records]
    if not errors:
        return None
    return Accuracy(len(errors), statistics.mean(map(abs, errors)), max(errors), min(errors))


def reached(records: Sequence[Record], kind: str, parameters: int) -> tuple[float, int] | None:
    """Median FLOP/s of a process in past runs of that kind, and of how many; None where there is none.

    Models within a factor of four of ``parameters``: small ones keep a device far less busy.
    """
    alike = [r for r in records if r.kind == kind and parameters / 4 <= r.parameters <= parameters * 4]
    rates = [record.flops for record in alike if record.flops > 0]
    return (statistics.median(rates), len(rates)) if rates else None
