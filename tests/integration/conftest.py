"""Real servers for the integration tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_START_S = 180


@dataclass
class MlflowServer:
    """A real ``mlflow server`` on a sqlite store in ``folder``; it can be killed, stopped, and started again."""

    folder: Path
    port: int
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *self._arguments()],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (OSError, urllib.error.URLError):
                time.sleep(0.3)
        log_tail = (self.folder / "server.log").read_text(errors="replace")[-2000:]
        self.kill()
        pytest.fail(f"mlflow server did not start in {_START_S} s:\n{log_tail}")

    def _arguments(self) -> list[str]:
        store, artifacts = f"sqlite:///{self.folder}/mlflow.db", str(self.folder / "artifacts")
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        return ["server", *where, "--backend-store-uri", store, "--artifacts-destination", artifacts]

    def signal(self, number: int) -> None:
        """Send a signal to the server and its workers (SIGSTOP makes a server that accepts and never answers)."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """``kill -9``, no goodbye."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A running server, shared by the tests of a worker: use an experiment of your own, and leave it running."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"), free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    """A server that is not started yet, for a test that starts, stops or kills it."""
    server = MlflowServer(tmp_path / "server", free_port())
    yield server
    server.kill()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exported model is not opened again in a process of its own: other tests do that."""
    monkeypatch.setattr("llmkit.training.outcome.verify", lambda *_: None)
    monkeypatch.chdir(tmp_path)
