"""Devices that a run can be planned for: their memory, peak and price, from ``devices.yaml`` or from this machine.

Users change and add devices in ``.llmkit/devices.yaml`` in the working directory, or in the file that the environment
variable ``LLMKIT_DEVICES`` names. Imports nothing heavy: a GPU of this machine is asked about by ``nvidia-smi``.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from llmkit.errors import UsageError

SHIPPED = Path(__file__).with_name("devices.yaml")
OWN = Path(".llmkit/devices.yaml")
VARIABLE = "LLMKIT_DEVICES"
GIB = float(1 << 30)
_KEYS = {"memory_gib", "bf16_tflops", "host_memory_gib", "cost_per_hour", "names"}
_NO_LIMIT = 1 << 60  # cgroup v1 writes a huge number for none
_SMI_SECONDS = 10


@dataclass(frozen=True)
class Device:
    """One device. ``memory`` and ``host_memory`` (the machine's share for each device) in bytes, ``peak`` in FLOP/s.

    ``count`` is how many this machine has; 0 for a device that is not here. On a CPU ``memory`` is the whole machine's.
    """

    name: str
    memory: float
    host_memory: float
    peak: float | None = None
    cost_per_hour: float | None = None
    names: tuple[str, ...] = ()
    cpu: bool = False
    count: int = 0
    where: str = ""


def device(name: str | None = None) -> Device:
    """The device of that name; without one, or for ``this``, what this machine has. Raises UsageError."""
    name = "this" if name is None else name.lower()
    if name == "this":
        return this_machine()
    if name == "cpu":
        return _cpu()
    table = devices()
    if name not in table:
        near = [known for known in table if known.startswith(name)] or difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"--device: there is no device {name!r}.{hint} Known: this, cpu, {', '.join(table)}. Add yours to {OWN}."
        )
    return table[name]


def devices() -> dict[str, Device]:
    """Every device by name: the shipped ones, changed and added to by the user's file."""
    table = _read(SHIPPED)
    own = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else OWN
    if os.environ.get(VARIABLE) and not own.is_file():
        raise UsageError(f"{VARIABLE}: there is no file {own}.")
    where = dict.fromkeys(table, "llmkit's device table; prices are examples")
    if own.is_file():
        for name, entry in _read(own).items():
            table[name] = table.get(name, {}) | entry
            where[name] = str(own)
    return {name: _device(name, entry, where[name]) for name, entry in table.items()}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    problems = [] if isinstance(found, dict) else ["it is not a mapping of names to devices"]
    for name, entry in found.items() if isinstance(found, dict) else ():
        if not isinstance(entry, dict):
            problems.append(f"{name}: expected a mapping with {', '.join(sorted(_KEYS))}")
            continue
        problems += [
            f"{name}.{key}: there is no such key. Known: {', '.join(sorted(_KEYS))}"
            for key in entry
            if key not in _KEYS
        ]
        for key in _KEYS & entry.keys() - {"names"}:
            value = entry[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                problems.append(f"{name}.{key}: expected a number above 0, got {value!r}")
    if problems:
        raise UsageError("\n".join([f"{path}:", *(f"  {line}" for line in problems)]))
    return {str(name).lower(): entry for name, entry in found.items()}


def _device(name: str, entry: dict[str, Any], where: str) -> Device:
    missing = [key for key in ("memory_gib",) if key not in entry]
    if missing:
        raise UsageError(f"{where}: the device {name} has no {missing[0]}.")
    memory = float(entry["memory_gib"]) * GIB
    return Device(
        name=name,
        memory=memory,
        host_memory=float(entry.get("host_memory_gib", 0)) * GIB or 2 * memory,
        peak=float(entry["bf16_tflops"]) * 1e12 if "bf16_tflops" in entry else None,
        cost_per_hour=float(entry["cost_per_hour"]) if "cost_per_hour" in entry else None,
        names=tuple(str(n) for n in entry.get("names", ())),
        where=where,
    )


def this_machine() -> Device:
    """Its GPUs where it has some (the smallest counts), else its CPU and memory."""
    found = _gpus()
    if not found:
        return _cpu()
    name, memory = min(found, key=lambda gpu: gpu[1])
    known = _by_driver_name(name)
    host = host_memory() / len(found)
    if known is None:
        return Device(name, memory, host, count=len(found), where="nvidia-smi")
    return replace(known, memory=memory, host_memory=host, count=len(found), where=f"nvidia-smi; {known.where}")


def _by_driver_name(name: str) -> Device | None:
    words = name.replace("-", " ")
    matching = [
        (len(alias), device)
        for device in devices().values()
        for alias in device.names
        if f" {alias.replace('-', ' ')} " in f" {words} "
    ]
    return max(matching, key=lambda pair: pair[0])[1] if matching else None


def _gpus() -> list[tuple[str, float]]:
    """Names and bytes of the GPUs that a run would see."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, _, mib = line.rpartition(",")
        if mib.strip().isdigit():
            found.append((name.strip(), float(mib) * (1 << 20)))
    wanted = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if wanted and all(part.isdigit() for part in wanted):
        return [found[int(part)] for part in wanted if int(part) < len(found)]
    return found[: len(wanted)] if wanted else found


def _cpu() -> Device:
    memory = host_memory()
    return Device("cpu", memory, memory, cpu=True, count=1, where="this machine", names=(_cpu_name(),))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "cpu")


def host_memory() -> float:
    """Bytes of memory that processes here may use: the machine's, or less where a container limits it."""
    import psutil

    limits = [float(psutil.virtual_memory().total)]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.is_file():
            text = path.read_text(encoding="utf-8").strip()
            if text.isdigit() and int(text) < _NO_LIMIT:
                limits.append(float(text))
    return min(limits)


def process_limit() -> float | None:
    """Bytes of resident memory that this process may still reach under ``ulimit -v`` or ``-d``; None without a limit.

    The limit is on address space, of which libraries reserve more than they use: that part is taken off.
    """
    import resource

    import psutil

    memory = psutil.Process().memory_info()
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    real = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return max(0.0, min(real) - (memory.vms - memory.rss)) if real else None
