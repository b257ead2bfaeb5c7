"""Peak memory of `llmkit embed` by the number of rows: it must not grow with them.

    python benchmarks/batch_memory.py [--rows 10000 200000]

all-MiniLM-L6-v2 over Banking77's questions as batch_kill.py writes them. The figure is the largest sum of the proportional set
sizes of the job and the process that prepares rows, asked for five times a second. Writes benchmarks/results/batch_memory-<date>.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil


def peak(command: list[str]) -> tuple[float, float]:
    """Bytes at the peak and seconds of a command that must end with 0."""
    begin, most = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        most = max(most, _memory(process.pid))
        time.sleep(0.2)
    assert process.stderr is not None
    if process.returncode != 0:
        raise SystemExit(process.stderr.read().decode(errors="replace")[-3000:])
    return most, time.monotonic() - begin


def _memory(pid: int) -> int:
    """Proportional set size of a process and its children: a page that two share is counted once."""
    total = 0
    try:
        for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += one.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return 0
    return total


def main() -> int:
    from batch_kill import model_of, recipe, write_rows
    from common import REPO, machine, write_result

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000])
    options = parser.parse_args()
    banking = REPO.parent / "shared" / "data" / "banking77" / "train.csv"
    found: list[dict[str, Any]] = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            source = write_rows(folder / "rows.jsonl", rows, banking)
            path = recipe("embed", folder / "job", source, model_of("embed", folder), 5_000)
            most, seconds = peak([sys.executable, "-m", "llmkit", "embed", str(path)])
        found.append({"rows": rows, "peak_mb": round(most / 1e6), "seconds": round(seconds)})
        print(found[-1], flush=True)
    write_result("batch_memory", {"machine": machine("torch", "transformers", "pyarrow"), "runs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
