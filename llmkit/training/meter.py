"""Speed and memory of a training run: tokens per second three ways, MFU, peak memory."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmkit.training.batching import Batch


@dataclass
class Meter:
    """Counts this process's work; multiplied by ``world_size`` for the run's rate.

    ``flops_per_token`` (forward and backward) and ``peak_flops`` (FLOP/s) give the model FLOPs utilisation of PaLM,
    appendix B (arXiv 2204.02311); without a known peak there is none.
    """

    world_size: int = 1
    flops_per_token: float = 0.0
    peak_flops: float | None = None
    tokens: int = 0
    positions: int = 0
    supervised: int = 0
    seconds: float = 0.0
    _started: float | None = field(default=None, repr=False)
    _mark: tuple[float, int, int, int] = (0.0, 0, 0, 0)

    def start(self) -> None:
        """Each step says so; a clock that runs goes on."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """The clock stands still in evaluation and saving."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def add(self, batch: Batch) -> None:
        self.tokens += batch.tokens
        self.positions += batch.positions
        self.supervised += batch.supervised

    @property
    def elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def since_last(self) -> dict[str, float]:
        """Rates since the last call."""
        now = (self.elapsed, self.positions, self.tokens, self.supervised)
        seconds, *counts = (a - b for a, b in zip(now, self._mark, strict=True))
        self._mark = now
        return self._rates(seconds, *counts)

    def total(self) -> dict[str, float]:
        """Rates of the whole run (since its start or resumption)."""
        return self._rates(self.elapsed, self.positions, self.tokens, self.supervised)

    def _rates(self, seconds: float, positions: float, tokens: float, supervised: float) -> dict[str, float]:
        if seconds <= 0:
            return {}
        scale = self.world_size / seconds
        rates = {
            "tokens_per_second": positions * scale,
            "tokens_per_second_non_padding": tokens * scale,
            "tokens_per_second_supervised": supervised * scale,
        }
        if self.peak_flops:
            rates["mfu"] = tokens / seconds * self.flops_per_token / self.peak_flops
        return rates


def peak_memory() -> dict[str, float]:
    """Highest resident memory of this process and, on a GPU, of the allocator; bytes."""
    found = {"peak_memory_host_bytes": resident_peak()}
    if torch.cuda.is_available():
        found["peak_memory_device_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def resident_peak() -> float:
    """Highest resident memory of this process in bytes.

    From the kernel's VmHWM on Linux: ``ru_maxrss`` of a process begins at what its parent had when it was started.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def resident() -> float:
    """Resident memory of this process now, in bytes."""
    found = _status("VmRSS")
    if found is not None:
        return found
    import psutil

    return float(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    """Let the highest resident memory begin anew (proc(5), clear_refs); nothing where the system has no such thing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _status(name: str) -> float | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")]
    return float(found[0]) * 1024 if found else None
