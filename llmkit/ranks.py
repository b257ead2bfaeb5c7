"""One run as several processes, seen from one of them: which it is, who started it, and what rank 0 decided.

Rank 0 prepares the folder, the others wait for its word. A process that llmkit's own launcher started (see
``llmkit.processes``) dies with it, and tells it how it ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from llmkit.errors import ProcessLostError, UsageError

LAUNCHER = "LLMKIT_LAUNCHER"
"""Environment variable of a process that llmkit's launcher started: a ``Launcher`` as JSON."""

_LONGEST_MESSAGE = 12_000
"""Characters of an error that are told to the launcher: in UTF-8 they fit a pipe that nobody has read yet."""


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """RANK and WORLD_SIZE, as torchrun, accelerate and DeepSpeed set them. ``UsageError`` where they are wrong."""
        raw = {key: os.environ.get(key, default) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        try:
            rank, world = int(raw["RANK"]), int(raw["WORLD_SIZE"])
        except ValueError:
            raise UsageError(f"RANK and WORLD_SIZE must be whole numbers, not {raw}.") from None
        if not 0 <= rank < world:
            raise UsageError(f"RANK={rank} is not below WORLD_SIZE={world}. Start the processes with torchrun.")
        return cls(rank, world)


@dataclass(frozen=True)
class Nodes:
    """Which machine of the run this process is on (``number``), of how many, and its rank there."""

    number: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Nodes:
        """LOCAL_WORLD_SIZE and LOCAL_RANK, as torchrun and DeepSpeed set them; without them all is one machine."""
        ranks = Ranks.from_environment()
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        size = int(here) if here.isdigit() and int(here) else ranks.world_size
        return cls(ranks.rank // size, -(-ranks.world_size // size), ranks.rank % size)


# The launcher


@dataclass(frozen=True)
class Launcher:
    """The llmkit process that started this one. ``report`` is a pipe to it, ``store`` the socket that rank 0 serves
    the run's key-value store on: it was bound before any process started, so that no other run can take its port."""

    pid: int
    report: int
    store: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Report:
    """How a process ended, in its own words: ``kind`` is the class of the error in ``llmkit.errors``."""

    kind: str
    message: str
    exit_code: int


@cache
def launcher() -> Launcher | None:
    """None in a process that something else started. Taken out of the environment: children are not its processes."""
    raw = os.environ.pop(LAUNCHER, None)
    return Launcher(**json.loads(raw)) if raw else None


def follow_launcher() -> None:
    """From now on the kernel kills this process when its launcher is gone, whatever it died of (Linux only)."""
    found = launcher()
    if found is None:
        return
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != found.pid:  # it was gone before that
        os._exit(1)


def tell_launcher(report: Report) -> bool:
    """Say how this process ends; True when someone will read it and show it to the user."""
    found = launcher()
    if found is None:
        return False
    content = asdict(report) | {"message": report.message[:_LONGEST_MESSAGE]}
    try:
        os.write(found.report, json.dumps(content, ensure_ascii=False).encode(errors="replace"))
    except OSError:
        return False
    return True


# The other processes


class Meeting:
    """A key-value store that all ranks of one start share: the same one a process group would be opened over.

    ``tell`` is rank 0's, ``hear`` the others'. No process group is opened. It must live as long as the run: rank 0
    serves the store, and the process group will use it.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(k)]
        if missing:
            raise UsageError(f"WORLD_SIZE={ranks.world_size} but {' and '.join(missing)} not set. Use torchrun.")
        import torch.distributed as dist

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._ranks = ranks
        self._store: Any = dist.PrefixStore(f"llmkit/{attempt}", _store(ranks, timeout))  # type: ignore[attr-defined]
        self._store.set(f"process/{ranks.rank}", f"{os.getpid()} {socket.gethostname()}")

    def tell(self, message: Mapping[str, Any]) -> None:
        """Returns when all have heard it: this process may end after it, and the store with it."""
        self._store.set("prepared", json.dumps(message))
        self._store.wait([f"heard/{rank}" for rank in range(1, self._ranks.world_size)])

    def hear(self) -> dict[str, Any]:
        """``ProcessLostError`` where rank 0 does not answer."""
        try:
            data: dict[str, Any] = json.loads(self._store.get("prepared"))
            self._store.set(f"heard/{self._ranks.rank}", "")
        except RuntimeError as exc:
            raise ProcessLostError(f"Rank 0 did not say what to do: {exc}") from exc
        return data

    def gone(self) -> list[str]:
        """The processes that are no more or stand still, in words, as far as this one can see (its own machine)."""
        found: list[str] = []
        for rank in range(self._ranks.world_size):
            try:
                if rank == self._ranks.rank or not self._store.check([f"process/{rank}"]):
                    continue
                pid, host = self._store.get(f"process/{rank}").decode().split(" ", 1)
            except RuntimeError:  # rank 0 served the store, and is gone
                return [*found, "rank 0 is gone"] if self._ranks.rank else found
            if host == socket.gethostname() and (how := how_it_stands(int(pid))):
                found.append(f"rank {rank} (process {pid}) {how}")
        return found


def _store(ranks: Ranks, timeout: timedelta) -> Any:
    import torch.distributed as dist

    found = launcher()
    if found is None or found.store is None:
        return next(iter(dist.rendezvous("env://", timeout=timeout)))[0]  # type: ignore[attr-defined]
    # As rendezvous would do it, but on the socket that is bound already.
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks.world_size, is_master=True, timeout=timeout,
        multi_tenant=True, master_listen_fd=found.store,
    )  # fmt: skip


def how_it_stands(pid: int) -> str:
    """What is wrong with a process of this machine, in words; ``""`` for one that runs or sleeps."""
    import psutil

    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "is gone"
    return {
        psutil.STATUS_ZOMBIE: "is gone",
        psutil.STATUS_DEAD: "is gone",
        psutil.STATUS_STOPPED: "is stopped (SIGSTOP)",
        psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
        psutil.STATUS_DISK_SLEEP: "waits for a disk",
    }.get(status, "")
