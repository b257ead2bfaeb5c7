"""The thread that brings a run's log to MLflow while the run lasts. The training never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from llmkit.errors import MissingError
from llmkit.tracking.delivery import Away, Delivery, why
from llmkit.tracking.spool import LOG_NAME, read
from llmkit.tracking.state import SendLock, State
from llmkit.tracking.target import Target

INTERVAL_S = 2.0
LONGEST_WAIT_S = 60.0
CLOSE_S = 30.0
CLOSE_STOPPED_S = 10.0
CLOSE_AWAY_S = 5.0
_LAST_JOIN_S = 1.0
_SLOWEST_BYTES_PER_S = 1e6


class Sender(threading.Thread):
    """Reads the log from the sent offset and sends; waits longer and longer while the server is away.

    ``note`` gets the few lines that a user should read; ``on_run`` the run's id as soon as it is known.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        state: State,
        *,
        note: Callable[[str], None],
        on_run: Callable[[str], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        super().__init__(name="llmkit-tracking", daemon=True)
        self._folder, self._state, self._note, self._on_run, self._interval_s = folder, state, note, on_run, interval_s
        self._delivery = Delivery(folder, target, state, note)
        self._uri = target.uri
        self._lock = SendLock(folder)
        self._wake = threading.Event()
        self._closing = self._abandoned = False
        self._failures = 0
        self._told = ""
        self.drained = False

    def run(self) -> None:
        try:
            if self._take_lock():
                self._loop()
        except MissingError as error:
            self._note(f"{error}. The run is recorded in {self._folder / LOG_NAME} only, until `llmkit sync` sends it")
        except Exception as error:  # noqa: BLE001  a bug here must cost neither the training nor the log
            self._note(f"tracking stopped: {type(error).__name__}: {why(error)}. Events wait in {LOG_NAME}")
        finally:
            self._lock.release()

    def finish(self, *, quick: bool = False) -> bool:
        """Let the thread send what is left, for a bounded time; True when everything was sent.

        The bound is 30 s (10 s when ``quick``) plus the time that waiting artifacts need at 1 MB/s; 5 s when the server
        is away, or when nothing moves for longer than what is being done may take.
        """
        began = time.monotonic()
        bound = CLOSE_STOPPED_S if quick else CLOSE_S + self._waiting_bytes() / _SLOWEST_BYTES_PER_S
        self._closing = True
        self._wake.set()
        while self.is_alive():
            self.join(0.05)
            now = time.monotonic()
            quiet = now - max(began, self._delivery.last_progress)
            away = self._failures > 0 and now - began > CLOSE_AWAY_S
            if away or quiet > max(CLOSE_AWAY_S, self._delivery.patience_s) or now - began > bound:
                break
        self._abandoned = True
        self._wake.set()
        self.join(_LAST_JOIN_S)
        return self.drained

    def _take_lock(self) -> bool:
        told = False
        while not self._lock.acquire():
            if not told:
                self._note(
                    f"process {self._lock.holder()} is sending {self._folder} to MLflow: waiting until it is done"
                )
                told = True
            if self._closing or self._abandoned:
                return False
            self._pause(1.0)
        return True

    def _loop(self) -> None:
        while not self._abandoned:
            closing = self._closing  # read before the log is: what is written after it is not missed
            try:
                self._connect()
                sent = self._delivery.send_some()
            except Away as error:
                self._back_off(str(error))
                continue
            self._back_again()
            if sent == 0 and closing:
                self.drained = True
                return
            if sent < 100 and not self._closing:
                self._pause(self._interval_s)

    def _connect(self) -> None:
        if not self._delivery.connected:
            self._delivery.connect()
            self._on_run(str(self._state.run_id))

    def _back_off(self, reason: str) -> None:
        self._failures += 1
        self._delivery.disconnect()
        if self._told != reason and (self._failures == 1 or "was deleted" in reason):
            self._told = reason
            self._note(
                f"MLflow cannot be reached ({reason}). The run goes on; events wait in {self._folder / LOG_NAME}"
            )
        longest = 1.0 if self._closing else LONGEST_WAIT_S
        self._pause(min(longest, 0.5 * 2 ** min(self._failures, 10)))

    def _back_again(self) -> None:
        if self._failures:
            self._failures, self._told = 0, ""
            self._note("MLflow is back: the waiting events are being sent")

    def _pause(self, seconds: float) -> None:
        if self._wake.wait(seconds):
            self._wake.clear()

    def _waiting_bytes(self) -> int:
        """Bytes of artifacts and models that are not sent yet."""
        total = 0
        for event in read(self._folder / LOG_NAME, self._state.sent):
            if event.kind in ("artifact", "model"):
                path = self._folder / str(event.body["path"])
                files = path.rglob("*") if path.is_dir() else [path]
                total += sum(file.stat().st_size for file in files if file.is_file())
        return total


def waiting(folder: Path, state: State) -> int:
    """Events that have not arrived: the unsent ones and the refused ones."""
    return sum(1 for _ in read(folder / LOG_NAME, state.sent)) + len(state.failed)
