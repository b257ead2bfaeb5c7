"""Runs whose folder is in a real S3 store (SeaweedFS): killed, resumed elsewhere, refused, cut off in mid-upload.

Where a test says "machine", it is another scratch folder: nothing else of the first one is there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkit import cli, mirror, uris
from llmkit.errors import StoreError
from llmkit.mirror.store import Store
from llmkit.mirror.units import Contents
from llmkit.ranks import Nodes

pytestmark = pytest.mark.server

HOLDER = """
import logging, sys, time
from pathlib import Path
from llmkit import mirror
from llmkit.ranks import Nodes
Path(sys.argv[2]).mkdir(parents=True)
with mirror.held(sys.argv[1], Path(sys.argv[2]), print, print, Nodes(), 5.0):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def bucket(s3_server: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder of this test's own in the shared store, whose environment is set."""
    s3_server.bucket("runs")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://runs/{request.node.name[:40]}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def become(name: str) -> Path:
        """From now on runs work on this machine; gives the folder below which they do."""
        monkeypatch.setenv("LLMKIT_SCRATCH", str(tmp_path / name))
        return tmp_path / name

    become("a")
    return become


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = tmp_path / "r.yaml"
    file.write_text(
        f"name: mine\nmodel: {{name_or_path: {tiny_llama}}}\n"
        f"data: {{train: {tmp_path / 'rows.jsonl'}, max_length: 128, cache_dir: {tmp_path / 'cache'}}}\n"
        "train: {max_steps: 8, save_steps: 2, logging_steps: 1, sample_prompts: 0, per_device_train_batch_size: 2}\n"
        "tracking: {enabled: false}\n",
        encoding="utf-8",
    )
    return file


def units(uri: str) -> set[str]:
    return set(Contents.of(Store(uri)).units)


def result(uri: str) -> dict[str, Any]:
    found = Store(uri).read("result.json")
    assert found is not None
    return dict(json.loads(found))


def test_killed_and_resumed_on_another_machine_it_ends_with_the_same_weights(
    bucket: str, machine: Callable[[str], Path], recipe: Path, tmp_path: Path, fast: None,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    long = ["train.max_steps=60"]
    assert cli.main(["sft", str(recipe), *long, f"output_dir={tmp_path / 'reference'}"]) == 0
    command = [sys.executable, "-m", "llmkit", "sft", str(recipe), *long, f"output_dir={bucket}"]
    killed = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    store, end = Store(bucket), time.monotonic() + 150
    while not any(name.startswith(".complete/checkpoints") for name in store.sizes()):
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert store.read("result.json") is None
    capfd.readouterr()

    scratch = machine("b")
    assert cli.main(["run", f"{bucket}/recipe.yaml"]) == 0
    said = capfd.readouterr().err
    assert "Going on from" in said and str(scratch) in said
    assert result(bucket)["status"] == "done" and "model" in units(bucket)
    ours = Store(bucket).read("model/model.safetensors")
    assert ours == (tmp_path / "reference" / "model" / "model.safetensors").read_bytes()

    scratch = machine("c")
    assert cli.main(["sft", str(recipe), *long, f"output_dir={bucket}"]) == 0
    assert "nothing to do" in capfd.readouterr().err
    assert not list(scratch.rglob("*.safetensors"))


def test_wrong_credentials_are_told_before_anything_is_trained(
    bucket: str, machine: Callable[[str], Path], recipe: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-this-one")
    assert cli.main(["sft", str(recipe), f"output_dir={bucket}"]) == 6
    said = capfd.readouterr().err
    assert bucket in said and "refuses" in said and "AWS_SECRET_ACCESS_KEY" in said
    assert "not-this-one" not in said and "Traceback" not in said and "step" not in said
    assert not [p for p in machine("a").rglob("*") if p.is_file() and not p.name.startswith(".")]


def test_a_bucket_that_does_not_exist_is_named_and_not_made(
    bucket: str, machine: Callable[[str], Path], recipe: Path, s3_server: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sft", str(recipe), "output_dir=s3://nowhere/run"]) == 6
    assert "s3://nowhere/run" in capfd.readouterr().err
    assert not s3_server.filesystem().exists("nowhere")


def test_a_server_killed_within_a_checkpoint_costs_an_exit_code_and_the_same_command_uploads_the_rest(
    mortal_s3_server: Any, machine: Callable[[str], Path], recipe: Path, fast: None, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mortal_s3_server.bucket("runs")
    for name, value in mortal_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = "s3://runs/cut-off"
    real = Store.upload

    def upload(store: Store, local: Path, name: str) -> None:
        if name == "checkpoints/checkpoint-4/optimizer.pt":
            mortal_s3_server.kill()
        real(store, local, name)

    monkeypatch.setattr(Store, "upload", upload)
    monkeypatch.setattr("llmkit.mirror.store.PATIENCE_S", 1.0)
    command = ["sft", str(recipe), f"output_dir={uri}", "train.save_total_limit=8", "launch.upload_minutes=0.02"]
    assert cli.main(command) == 6
    said = capfd.readouterr().err
    scratch = uris.workplace(uri)
    assert "step 8/8" in said  # training did not stop for it
    for name in ("checkpoints/checkpoint-4", str(scratch), "same command"):
        assert name in said.rpartition("Not in")[2]
    assert json.loads((scratch / "result.json").read_text(encoding="utf-8"))["status"] == "done"

    monkeypatch.setattr(Store, "upload", real)
    mortal_s3_server.start()
    assert units(uri) == {"checkpoints/checkpoint-2"}
    assert "checkpoints/checkpoint-4/model.safetensors" in Store(uri).sizes()  # there, and not complete
    assert Store(uri).read("result.json") is None

    assert cli.main(command) == 0
    said = capfd.readouterr().err
    assert "nothing to do" in said and "step 1/8" not in said
    assert units(uri) == {*(f"checkpoints/checkpoint-{step}" for step in (2, 4, 6, 8)), "model"}
    assert result(uri)["status"] == "done"


def test_an_object_of_many_parts_whose_server_dies_never_appears(
    mortal_s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 MB go up in parts of 50; the server is killed while they do."""
    import s3fs

    mortal_s3_server.bucket("runs")
    for name, value in mortal_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    scratch, uri = tmp_path / "scratch", "s3://runs/large"
    shard = scratch / "shards" / "part-0.parquet"
    scratch.mkdir()
    real, parts = s3fs.S3FileSystem._call_s3, []

    async def call(fs: Any, method: str, *args: Any, **given: Any) -> Any:
        if method == "upload_part":
            parts.append(given["PartNumber"])
            if len(parts) == 2:
                mortal_s3_server.kill()
        return await real(fs, method, *args, **given)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    monkeypatch.setattr("llmkit.mirror.store.PATIENCE_S", 1.0)
    notes: list[str] = []
    with (
        pytest.raises(StoreError, match=r"shards/part-0\.parquet"),
        mirror.held(uri, scratch, notes.append, notes.append, Nodes(), 0.5) as held,
    ):
        shard.parent.mkdir()
        shard.write_bytes(os.urandom(120 * 2**20))
        held.publish(shard)
    assert len(parts) >= 2
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", real)
    mortal_s3_server.start()
    assert "shards/part-0.parquet" not in Store(uri).sizes() and units(uri) == set()
    with mirror.held(uri, scratch, notes.append, notes.append, Nodes(), 30.0):
        pass
    assert units(uri) == {"shards"}
    assert Store(uri).sizes()["shards/part-0.parquet"] == 120 * 2**20


def test_two_at_once_are_refused_and_any_stage_writes_there(
    bucket: str, machine: Callable[[str], Path], recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"{bucket}/checked"
    command = ["check-data", str(recipe), f"output_dir={uri}"]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, uri, str(tmp_path / "holder" / "x")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert cli.main(command) == 2
        said = capfd.readouterr().err
        assert f"process {holder.pid}" in said and uri in said
    finally:
        holder.kill()
        holder.wait()
    assert cli.main(command) == 0
    assert result(uri)["uri"] == uri and "guard_report.json" in Store(uri).sizes()
    machine("b")
    assert cli.main([*command, "data.max_length=64"]) == 0  # another recipe: the old run is moved aside
    assert "guard_report.json" in Store(f"{uri}.1").sizes()
    assert result(uri)["status"] == "done"
