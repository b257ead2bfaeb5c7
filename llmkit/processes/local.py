"""Start the processes of a run on this machine, watch them, and end them together.

Each is the command of one process (``llmkit run OUT/recipe.yaml``) with the environment that torchrun would give it.
Why not torchrun itself: docs/decisions/local-processes.md.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from llmkit import rundir, runner
from llmkit.context import Result
from llmkit.errors import LlmkitError, StoppedEarly
from llmkit.launch.job import Job
from llmkit.processes import limits
from llmkit.processes.screen import Screen, last_lines
from llmkit.processes.verdict import End, verdict
from llmkit.ranks import LAUNCHER, Launcher, Report, how_it_stands
from llmkit.runner import SIGNALS, Prepared
from llmkit.secrets import mask

GRACE_SECONDS = 10.0
"""What the others get to notice, write down and leave, when a process has failed."""
HURRY_SECONDS = 5.0
"""The same after a second Ctrl-C."""
TAIL_LINES = 15
_LOOK_SECONDS = 0.1


def run(job: Job, prepared: Prepared, asked: Asked) -> Result:
    """Run a prepared job in ``job.resources.processes_per_node`` processes, and give back what rank 0 wrote.

    Raises the class of ``llmkit.errors`` that the run ended with, ``ProcessLostError`` for a process that was killed,
    ended without a word or hung; ``result.json`` says the same.
    """
    kills = limits.oom_kills()
    ends = _Group(job, prepared, asked).run()
    error = verdict(ends, kills=limits.oom_kills() - kills, limit=limits.memory_limit())
    if error is None:
        result = rundir.read_result(prepared.folder)
        if result is None:
            raise LlmkitError(f"The processes ended without an error, but {prepared.folder} holds no result.json.")
        return result
    if asked.twice:
        error = KeyboardInterrupt("interrupted")
    written = rundir.read_result(prepared.folder)
    if written is None or written.error != mask(str(error)):  # rank 0 could not, or knew less
        runner.record(prepared, error)
    raise error


class Asked:
    """Signals that this process got, in their order."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    @property
    def twice(self) -> bool:
        return self.signals.count(signal.SIGINT) > 1

    @contextmanager
    def listening(self) -> Iterator[Asked]:
        """Outside the main thread nothing is heard, and nothing changed."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number))

    def refuse_to_begin(self) -> None:
        """StoppedEarly where a signal came before there was anything to stop."""
        if self.signals:
            raise StoppedEarly(f"Stopped by {self.signals[0].name} before the run began. The same command begins it.")


@dataclass
class _Process:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    """Bytes that the log had before this start."""
    report: int
    """Read end of the pipe on which the process says how it ended."""
    told: int = 0
    """Signals that it was sent: each of ours, once."""

    def pass_on(self, signals: Sequence[signal.Signals]) -> None:
        for number in signals[self.told :]:
            self.told += 1
            self.process.send_signal(number)


@dataclass
class _Group:
    """All processes of one start."""

    job: Job
    prepared: Prepared
    asked: Asked
    running: list[_Process] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)

    def run(self) -> list[End]:
        logs = self.prepared.folder / "logs"
        logs.mkdir(exist_ok=True)
        self.screen = Screen(logs / "rank-0.log")
        try:
            self._start(logs)
            self._watch()
        finally:
            for one in self.running:  # only after an error of our own
                _kill(one.process)
            self.screen.close()
        return self.ends

    def _start(self, logs: Path) -> None:
        count = self.job.resources.processes_per_node
        with ExitStack() as stack:
            store = stack.enter_context(socket.socket())
            store.bind(("127.0.0.1", 0))
            stack.callback(self.screen.give_away)
            for rank in range(count):
                self.running.append(self._start_one(rank, count, logs / f"rank-{rank}.log", store))

    def _start_one(self, rank: int, count: int, log: Path, store: socket.socket) -> _Process:
        offset = log.stat().st_size if log.exists() else 0
        with ExitStack() as stack:
            read, write = os.pipe()
            stack.callback(os.close, write)
            kept = [write, *([self.prepared.lock] if self.prepared.lock is not None else [])]
            launcher = Launcher(os.getpid(), write, store.fileno() if count > 1 and rank == 0 else None)
            kept += [store.fileno()] if launcher.store is not None else []
            env = dict(os.environ) | _environment(rank, count, store.getsockname()[1]) | dict(self.job.env)
            stack.enter_context(_blocked_signals())
            process = subprocess.Popen(
                self.job.argv, stdin=subprocess.DEVNULL, cwd=self.job.cwd, env=env | {LAUNCHER: launcher.to_json()},
                stdout=self._output(rank, log, stack), stderr=subprocess.STDOUT, pass_fds=kept,
                start_new_session=True,  # the terminal's Ctrl-C reaches it through us, once
            )  # fmt: skip
        return _Process(rank, process, log, offset, read)

    def _output(self, rank: int, log: Path, stack: ExitStack) -> int:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file = stack.enter_context(log.open("ab"))
        file.write(f"--- rank {rank}, started {now}\n".encode())
        file.flush()
        return self.screen.child_end if rank == 0 else file.fileno()

    def _watch(self) -> None:
        deadline = float("inf")
        while self.running:
            self.screen.pump(_LOOK_SECONDS)
            for one in [p for p in self.running if p.process.poll() is not None]:
                self._note_end(one)
                deadline = min(deadline, time.monotonic() + self._patience(self.ends[-1]))
            for one in self.running:
                one.pass_on(self.asked.signals)
            if self.asked.twice:
                deadline = min(deadline, time.monotonic() + HURRY_SECONDS)
            if time.monotonic() > deadline:
                for one in list(self.running):
                    self._end(one)
        self.screen.drain()

    def _patience(self, end: End) -> float:
        """Seconds that the others may still take. All finish, or stop with a checkpoint, each at its own pace."""
        if end.code in (0, StoppedEarly.exit_code):
            return self.prepared.recipe.launch.timeout_minutes * 60
        return GRACE_SECONDS

    def _end(self, one: _Process) -> None:
        how = how_it_stands(one.process.pid)
        why = f"it {how}" if how else "it did not end by itself after the others had"
        if self.asked.twice:
            why = "Ctrl-C was pressed twice"
        _kill(one.process)
        self._note_end(one, why)

    def _note_end(self, one: _Process, ended: str = "") -> None:
        self.running.remove(one)
        code = one.process.wait()
        if code != 0:
            _kill(one.process)  # what it had started itself
        if one.rank == 0:
            self.screen.drain()
            tail = self.screen.tail(TAIL_LINES)
        else:
            tail = last_lines(one.log, one.offset, TAIL_LINES)
        tail = [line for line in tail if not line.startswith("--- rank ")]
        self.ends.append(End(one.rank, code, one.log, _read_report(one.report), tail, ended))


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun would set, and the threads that a process may use."""
    if count == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads_each(count)),
    }  # fmt: skip


def threads_each(count: int) -> int:
    """Threads of each of ``count`` processes: the cores divided among them, or what OMP_NUM_THREADS says."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, limits.cores() // count)


def _read_report(pipe: int) -> Report | None:
    with os.fdopen(pipe, "rb") as file:
        os.set_blocking(file.fileno(), False)
        data = file.read()
    return Report(**json.loads(data)) if data else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and everything in its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """A process that is started meanwhile gets these signals when it unblocks them, not before."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
