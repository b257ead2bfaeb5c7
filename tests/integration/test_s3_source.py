"""Training rows in a real S3 store (SeaweedFS)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.server


@pytest.fixture
def recipe(s3_server: Any, tiny_llama: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(40)]
    body = "\n".join(json.dumps(row) for row in rows).encode()
    store = s3_server.bucket("rows")
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


def test_rows_are_read_from_a_glob_in_the_store(s3_server: Any, recipe: Path, run_llmkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run_llmkit("sft", str(recipe), env=s3_server.environment)
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "out" / "data_report.json").read_text(encoding="utf-8"))
    assert "80 rows" in done.stderr
    assert set(report["digests"]) == {"s3://rows/a.jsonl", "s3://rows/b.jsonl"}


def test_a_wrong_secret_is_one_clear_message(s3_server: Any, recipe: Path, run_llmkit) -> None:  # type: ignore[no-untyped-def]
    done = run_llmkit("sft", str(recipe), env=s3_server.environment | {"AWS_SECRET_ACCESS_KEY": "not-this-one"})
    assert done.code in (3, 6), done.stderr
    assert "Traceback" not in done.stderr and "s3://rows" in done.stderr and "data.train" in done.stderr


def test_an_object_that_is_not_there_is_named(s3_server: Any, recipe: Path, run_llmkit) -> None:  # type: ignore[no-untyped-def]
    done = run_llmkit("sft", str(recipe), "data.train=s3://rows/none.jsonl", env=s3_server.environment)
    assert done.code == 3, done.stderr
    assert "Traceback" not in done.stderr and "s3://rows/none.jsonl" in done.stderr
