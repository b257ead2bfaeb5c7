"""Chunks through several processes, results in order: ``python -m llmkit.data.guard.workers`` is one of them.

Processes of their own, and no ``multiprocessing``: forking a process that has loaded torch is not safe, and its other
ways import the user's script again, which a notebook or a script without a main guard does not survive.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Self

from llmkit.data.guard.features import Examiner, Features, Task
from llmkit.data.rows import Sample
from llmkit.errors import LlmkitError

_MOST = 16
Chunk = tuple[str, Sequence[Sample]]


def processes() -> int:
    """As many as this process may use cores, at most 16."""
    return min(_MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Pool:
    """``count`` worker processes; with 0 the work is done here. Closing it ends them."""

    def __init__(self, task: Task, count: int) -> None:
        self._here = None if count else Examiner(task)
        self._workers = [_Worker(task) for _ in range(count)]
        self._threads = ThreadPoolExecutor(max(1, count))
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def examine(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Features]]:
        """Each chunk with its features, in order; a few chunks are under way at a time. Raises what a worker raised."""
        if self._here is not None:
            for chunk in chunks:
                yield chunk, self._here(*chunk)
            return
        under_way: deque[tuple[Chunk, Future[Features]]] = deque()
        for chunk in chunks:
            under_way.append((chunk, self._threads.submit(self._one, chunk)))
            if len(under_way) > 2 * len(self._workers):
                done, future = under_way.popleft()
                yield done, future.result()
        for done, future in under_way:
            yield done, future.result()

    def _one(self, chunk: Chunk) -> Features:
        worker = self._idle.get()
        try:
            return worker.ask(chunk)
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self, task: Task) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        # a session of its own: Ctrl-C is for the run, which ends its workers by closing their input
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self._send(task)

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def ask(self, chunk: Chunk) -> Features:
        assert self._process.stdout is not None
        try:
            self._send(chunk)
            answer: Features | BaseException = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise LlmkitError(
                f"A worker of the data guard ended with exit code {code}; memory is the usual reason."
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()


def main() -> int:
    """Answer chunks until the input ends."""
    read, write = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get between the answers
    examiner: Examiner | None = None
    failure: BaseException | None = None
    try:
        examiner = Examiner(pickle.load(read))
    except Exception as error:  # noqa: BLE001  raised again on the other side, with the first chunk
        failure = error
    while (chunk := _next(read)) is not None:
        try:
            answer: Any = failure if examiner is None else examiner(*chunk)
        except Exception as error:  # noqa: BLE001  raised again on the other side
            answer = error
        pickle.dump(answer, write, pickle.HIGHEST_PROTOCOL)
        write.flush()
    return 0


def _next(stream: IO[bytes]) -> Chunk | None:
    try:
        chunk: Chunk = pickle.load(stream)
    except EOFError:
        return None
    return chunk


if __name__ == "__main__":
    sys.exit(main())
