"""Uploading beside the run: a thread that takes orders, and tries each again until the store took it."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from llmkit.errors import LlmkitError, StoreError

OUTBOX = ".outbox"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 20.0


@dataclass(frozen=True)
class Order:
    """Upload the files of ``staged`` (they have the run folder's names below it) as ``unit``, or remove the unit where
    there is no ``staged``."""

    unit: str
    staged: Path | None
    divided: bool = False


class Uploads:
    """``work`` carries an order out and raises StoreError where that may be tried again; any other error ends the thread.

    Files are hard links to what was published: the run may remove its own, they are uploaded all the same.
    """

    def __init__(
        self, folder: Path, work: Callable[[Order], None], note: Callable[[str], None], patience_s: float
    ) -> None:
        self._folder, self._work, self._note, self._patience_s = folder, work, note, patience_s
        self._orders: list[Order] = []
        self._doing: Order | None = None
        self._numbers = count()
        self._changed = threading.Condition()
        self._closing: float | None = None
        self._thread: threading.Thread | None = None
        self.trouble: BaseException | None = None

    def publish(self, path: Path, unit: str, *, divided: bool = False) -> None:
        staged = self._folder / OUTBOX / str(os.getpid()) / str(next(self._numbers))
        _link(path, staged / unit)
        self._drop(unit)
        self._add(Order(unit, staged, divided))

    def retire(self, unit: str) -> None:
        self._drop(unit)
        self._add(Order(unit, None))

    def close(self, patience_s: float | None = None) -> list[str]:
        """Wait until everything is uploaded, or the store did not take anything for the patience; what is left."""
        with self._changed:
            self._closing = time.monotonic()
            if patience_s is not None:
                self._patience_s = patience_s
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        left = ([self._doing] if self._doing else []) + self._orders
        return [order.unit for order in left if order.staged is not None]

    def _drop(self, unit: str) -> None:
        """Forget what was ordered for a unit and not begun."""
        with self._changed:
            for order in [o for o in self._orders if o.unit == unit]:
                self._orders.remove(order)
                _remove(order)

    def _add(self, order: Order) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llmkit-uploads", daemon=True)
                self._thread.start()

    def _next(self) -> Order | None:
        """Uploads come first: an old checkpoint is removed when the newer one is there."""
        with self._changed:
            while not self._orders and self._closing is None:
                self._changed.wait()
            first = next((o for o in self._orders if o.staged is not None), None)
            found = first or (self._orders[0] if self._orders else None)
            if found is not None:
                self._orders.remove(found)
            self._doing = found
            return found

    def _run(self) -> None:
        while (order := self._next()) is not None:
            try:
                if not self._carry_out(order):
                    return
            except Exception as exc:  # noqa: BLE001  told by whoever waits for the thread
                self.trouble = exc
                return
            _remove(order)
            self._doing = None

    def _carry_out(self, order: Order) -> bool:
        """False where the run ends and the store does not take it."""
        pause, began = _FIRST_PAUSE_S, time.monotonic()
        while True:
            try:
                self._work(order)
            except StoreError as exc:
                if self.trouble is None:
                    self._note(f"{exc}\nThe run goes on; uploads are tried again.")
                self.trouble = exc
                if self._given_up(began, exc):
                    return False
            else:
                self.trouble = None
                return True
            with self._changed:
                self._changed.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _given_up(self, began: float, exc: StoreError) -> bool:
        if self._closing is None:
            return False
        return not exc.passing or time.monotonic() - max(began, self._closing) > self._patience_s


def error_of(trouble: BaseException | None) -> LlmkitError | None:
    """The trouble where it is one of llmkit's own errors; raises any other: that is a bug."""
    if trouble is None or isinstance(trouble, LlmkitError):
        return trouble
    raise trouble


def _link(path: Path, target: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} was published and does not exist")
    for source in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if source.is_file():
            beside = target / source.relative_to(path) if path.is_dir() else target
            beside.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, beside)
            except OSError:  # a file system without hard links
                shutil.copy2(source, beside)


def _remove(order: Order) -> None:
    if order.staged is not None:
        with contextlib.suppress(OSError):
            shutil.rmtree(order.staged)
