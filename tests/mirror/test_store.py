"""A folder in a store, over two file systems of fsspec; the same against a real S3 server: tests/integration/test_s3_output.py."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest

from llmkit.errors import MissingError, StoreError, UsageError
from llmkit.mirror.store import Store


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    where = f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/store/run"
    return Store(where)


def test_objects_are_written_read_listed_copied_and_removed(store: Store, tmp_path: Path) -> None:
    assert store.sizes() == {} and store.read("a") is None
    local = tmp_path / "local"
    local.write_bytes(b"12345")
    store.write("a", b"1")
    store.upload(local, "deep/er/b c")
    assert store.sizes() == {"a": 1, "deep/er/b c": 5} and store.sizes("deep") == {"deep/er/b c": 5}
    assert store.read_many(["a", "deep/er/b c", "none"]) == {"a": b"1", "deep/er/b c": b"12345"}
    assert store.download("deep/er/b c", tmp_path / "back") and (tmp_path / "back").read_bytes() == b"12345"
    assert not store.download("none", tmp_path / "back")
    other = store.beside(".1")
    store.copy("deep/er/b c", other)
    assert other.sizes() == {"deep/er/b c": 5}
    store.delete(["a", "never was"])
    assert store.sizes() == {"deep/er/b c": 5}


def test_an_object_is_created_once(store: Store) -> None:
    assert store.create("lease", b"mine")
    assert not store.create("lease", b"theirs")
    assert store.read("lease") == b"mine"
    assert store.replace("lease", b"new", None) and store.read("lease") == b"new"


def test_a_file_that_is_half_written_does_not_have_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file grows under the eyes of its readers, it is written under another name."""
    store = Store(f"file://{tmp_path}/run")
    store.write("result.json", b"old")

    def cut(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[:1])
        raise PermissionError(13, "no more")

    monkeypatch.setattr(store._fs, "pipe_file", cut)
    with pytest.raises(StoreError):
        store.write("result.json", b"new")
    assert (tmp_path / "run" / "result.json").read_bytes() == b"old"


def test_a_store_that_is_away_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}", patience_s=5)
    real, calls = store._fs.pipe_file, []

    def sometimes(path: str, data: bytes) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise ConnectionResetError("gone for a moment")
        real(path, data)

    monkeypatch.setattr(store._fs, "pipe_file", sometimes)
    store.write("a", b"1")
    assert len(calls) == 3 and store.read("a") == b"1"


def test_a_store_that_stays_away_and_one_that_refuses_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}", patience_s=0)

    def fail_with(error: Exception) -> StoreError:
        def fail(path: str, data: bytes) -> None:
            raise error

        monkeypatch.setattr(store._fs, "pipe_file", fail)
        with pytest.raises(StoreError) as caught:
            store.write("a", b"1")
        assert caught.value.exit_code == 6
        return caught.value

    away = fail_with(ConnectionRefusedError("connection refused"))
    assert away.passing and "does not answer" in str(away) and store.uri in str(away)
    refused = fail_with(PermissionError("AccessDenied"))
    assert not refused.passing and "refuses" in str(refused)


def test_a_protocol_without_its_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingError, match=r"llmkit\[s3\]"):
        Store("s3://bucket/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingError, match="gcsfs"):
        Store("gs://bucket/run")
    with pytest.raises(UsageError, match="nosuch"):
        Store("nosuch://bucket/run")
