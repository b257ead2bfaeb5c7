"""What the benchmarks share: what machine this is, a silent progress display, and where a dated result goes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"


def machine(*packages: str) -> dict[str, Any]:
    """CPU model and its matrix instructions, cores, threads given to the run, memory, load now, Python and the versions
    of ``packages``.
    """
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name} " in text],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


class Quiet:
    """A progress display that shows nothing."""

    def note(self, text: str) -> None: ...

    @contextmanager
    def task(self, what: str, total: int | None = None, unit: str = "rows") -> Iterator[Quiet]:
        yield self

    def advance(self, n: int = 1) -> None: ...

    def step(self, step: int, total: int, metrics: Any) -> None: ...

    log = step


def write_result(name: str, result: dict[str, Any]) -> Path:
    """``benchmarks/results/NAME-DATE.json``; prints where."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(REPO)}")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
