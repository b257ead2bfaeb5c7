"""System metrics: a thread that samples CPU, memory, disk and GPU while a run lasts.

The names are MLflow's own where it has one, so that its page shows them under "System metrics". A sample's step is the
number of seconds since the run began, so a resumed run goes on to the right of where it stopped.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MB = 1e6
_log = logging.getLogger("llmkit.tracking")
Write = Callable[[dict[str, float], int], None]


class Sampler(threading.Thread):
    """Calls ``write(metrics, step)`` every ``interval_s`` seconds until ``stop``; ``began_s`` is the run's start (epoch)."""

    def __init__(self, write: Write, folder: Path, *, began_s: float, interval_s: float = 10.0) -> None:
        super().__init__(name="llmkit-system-metrics", daemon=True)
        self._write, self._folder, self._began_s, self._interval_s = write, folder, began_s, interval_s
        self._stop_asked = threading.Event()

    def run(self) -> None:
        try:
            import psutil
        except ImportError:
            _log.info("psutil is not installed: no system metrics (pip install psutil)")
            return
        process = psutil.Process()
        gpus = _gpu_reader()
        psutil.cpu_percent()
        while not self._stop_asked.wait(min(self._interval_s, 1.0)):
            started = time.monotonic()
            try:
                sample = _machine(psutil, self._folder) | _process_tree(psutil, process) | gpus()
                self._write(sample, max(0, round(time.time() - self._began_s)))
            except (OSError, psutil.Error, subprocess.SubprocessError) as error:
                _log.debug("a sample of system metrics failed: %s", error)
            if self._stop_asked.wait(max(0.0, self._interval_s - 1.0 - (time.monotonic() - started))):
                return

    def stop(self) -> None:
        self._stop_asked.set()


def _machine(psutil: Any, folder: Path) -> dict[str, float]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / _MB,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": 100.0 * disk.used / disk.total,
        "system/disk_available_megabytes": disk.free / _MB,
    }


def _process_tree(psutil: Any, process: Any) -> dict[str, float]:
    """Resident memory of this process and all it started; those that end meanwhile are left out."""
    resident = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            resident += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return {"system/process_tree_resident_megabytes": resident / _MB}


def _gpu_reader() -> Callable[[], dict[str, float]]:
    """How to read the GPUs here: NVIDIA's library, its command, or not at all."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        return lambda: _from_library(pynvml)
    except ImportError:
        _log.debug("no pynvml")
    except Exception as error:  # noqa: BLE001  the library's own error type, raised where there is no driver
        _log.debug("NVIDIA's library does not start: %s", error)
    return _from_command if shutil.which("nvidia-smi") else dict


def _from_library(pynvml: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        load = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        found |= _gpu(number, load, memory.used / _MB, memory.total / _MB, pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
    return found


def _from_command() -> dict[str, float]:
    query = "--query-gpu=index,utilization.gpu,memory.used,memory.total,power.draw"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5, check=True
    )
    found: dict[str, float] = {}
    mib = 1.048576
    for line in done.stdout.splitlines():
        fields = [_number(part) for part in line.split(",")]
        if len(fields) == 5 and fields[0] is not None:
            used, total = (None if f is None else f * mib for f in fields[2:4])
            found |= _gpu(int(fields[0]), fields[1], used, total, fields[4])
    return found


def _number(text: str) -> float | None:
    """nvidia-smi writes ``[N/A]`` for what a device does not tell."""
    try:
        return float(text)
    except ValueError:
        return None


def _gpu(
    number: int, load: float | None, used: float | None, total: float | None, watts: float | None
) -> dict[str, float]:
    values = {
        "utilization_percentage": load,
        "memory_usage_megabytes": used,
        "memory_usage_percentage": 100.0 * used / total if used is not None and total else None,
        "power_usage_watts": watts,
    }
    return {f"system/gpu_{number}_{name}": value for name, value in values.items() if value is not None}
