"""What this machine allows a run: visible devices, cores, and memory (cgroups v1 and v2, ``ulimit -v``)."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def visible_devices() -> int:
    """GPUs that a process started now would see; 0 without one.

    Counted without loading torch, where that is possible: only a machine with several is asked properly.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and "," not in chosen:
        return 1 if chosen.strip() not in ("", "-1") and _device_files() else 0
    here = _device_files()
    return here if here < 2 else _ask_torch()


def _device_files() -> int:
    nvidia = [p for p in Path("/dev").glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()]
    amd = list(Path("/dev/dri").glob("renderD*")) if Path("/dev/kfd").exists() else []
    return max(len(nvidia), len(amd))


def _ask_torch() -> int:
    """torch knows what CUDA_VISIBLE_DEVICES, MIG and drivers make of the devices. In a process of its own."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else 0


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> tuple[int, str] | None:
    """The lowest limit on this process's memory in bytes, and whose it is; None where only the machine's size is."""
    found = [(size, "control group") for size in _cgroup_limits()]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        found.append((address_space, "ulimit -v"))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min((limit for limit in found if limit[0] < machine or limit[1] != "control group"), default=None)


def oom_kills() -> int:
    """How often the kernel killed a process for want of memory, in this process's control group, else anywhere."""
    for folder in _memory_cgroups():
        for name in ("memory.events", "memory.oom_control"):
            count = _field(folder / name, "oom_kill")
            if count is not None:
                return count
    return _field(Path("/proc/vmstat"), "oom_kill") or 0


def _cgroup_limits() -> Iterator[int]:
    for own in _memory_cgroups():
        for folder in (own, *own.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                text = _read(folder / name).strip()
                if text.isdigit():
                    yield int(text)
            if folder == CGROUPS:
                break


def _memory_cgroups() -> Iterator[Path]:
    """This process's control group, in v2 and in v1; the top one where the path is of another namespace."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top = CGROUPS
        elif "memory" in controllers.split(","):
            top = CGROUPS / "memory"
        else:
            continue
        own = top / path.lstrip("/")
        yield own if own.is_dir() else top


def _field(path: Path, name: str) -> int | None:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
