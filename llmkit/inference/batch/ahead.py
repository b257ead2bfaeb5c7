"""The next chunk is prepared (templates, tokens) in a process of its own while the model works on the present one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from llmkit.errors import ProcessLostError
from llmkit.inference.batch.assemble import Chunk, Worked, work_out
from llmkit.inference.batch.settings import BatchRecipe
from llmkit.inference.batch.work import Work, open_work

Rows = Sequence[Mapping[str, Any]]

_work: Work | None = None


class Ahead:
    """The engine of one process: it computes a chunk while the next is prepared. The first is prepared here too: a small
    job needs no other process."""

    def __init__(self, target: str, recipe: BatchRecipe, work: Work) -> None:
        self._target, self._recipe, self._own = target, recipe, work
        self._pool: ProcessPoolExecutor | None = None
        self._submitted = 0

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                with suppress(AttributeError):
                    process.terminate()

    def work_on(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Worked | None]]:
        waiting: deque[tuple[Chunk, Future[Sequence[Any]] | None]] = deque()
        for chunk in chunks:
            waiting.append((chunk, None if chunk.complete else self.submit(chunk.to_compute())))
            if len(waiting) > 1:
                yield self._worked(*waiting.popleft())
        for chunk, prepared in waiting:
            yield self._worked(chunk, prepared)

    def _worked(self, chunk: Chunk, prepared: Future[Sequence[Any]] | None) -> tuple[Chunk, Worked | None]:
        return chunk, None if prepared is None else work_out(self._own, take(prepared))

    def submit(self, rows: Rows) -> Future[Sequence[Any]]:
        self._submitted += 1
        if self._submitted == 1:
            future: Future[Sequence[Any]] = Future()
            future.set_result(self._own.prepare(rows))
            return future
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                1, mp_context=context, initializer=_begin, initargs=(self._target, self._recipe, os.getpid())
            )
        return self._pool.submit(_prepare, rows)


def take(future: Future[Sequence[Any]]) -> Sequence[Any]:
    """The prepared rows. ProcessLostError where the process that prepares is gone."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ProcessLostError("The process that prepares the next rows was killed (out of memory?).") from error


def _begin(target: str, recipe: BatchRecipe, parent: int) -> None:
    """In the new process: end with the parent, leave signals to it, and open the tokenizer."""
    global _work
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model's memory is not for this process
    _work = open_work(target, recipe)


def _prepare(rows: Rows) -> Sequence[Any]:
    assert _work is not None
    return _work.prepare(rows)
