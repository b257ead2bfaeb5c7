"""Vectors as .npy, Lance and FAISS: every row in order, with its key, and found again by a search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkit.errors import DataError, MissingError
from llmkit.inference.embedding.export import check_installed, export
from llmkit.inference.embedding.settings import ExportSettings


def shards(folder: Path, kind: Any = np.float32) -> tuple[list[Path], np.ndarray]:
    """Three shards, the second without a row."""
    drawn = np.random.default_rng(0)
    vectors = drawn.normal(size=(90, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if kind is np.uint8:
        vectors = np.packbits(vectors > 0, axis=1)
    vectors = vectors.astype(kind)
    paths = []
    for i, part in enumerate([slice(0, 50), slice(50, 50), slice(50, 90)]):
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors[part].reshape(-1)), vectors.shape[1])
        keys = [f"k{row}" for row in range(90)][part]
        table = pa.table(
            {
                "id": pa.array(keys, pa.string()),
                "day": pa.array(["2026-11-27"] * len(keys), pa.string()),
                "embedding": values,
            }
        )
        paths.append(folder / f"{i}.parquet")
        pq.write_table(table, paths[-1])
    return paths, vectors


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8, np.uint8])
def test_npy_can_be_mapped_and_has_its_keys_beside_it(tmp_path: Path, kind: Any) -> None:
    paths, vectors = shards(tmp_path, kind)
    made = export(paths, "embedding", tmp_path, ExportSettings(npy=True))
    assert made == {"vectors_keys": "vectors_keys.parquet", "vectors_npy": "vectors.npy"}
    found = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert isinstance(found, np.memmap)
    assert found.dtype == kind
    assert (found == vectors).all()
    keys = pq.read_table(tmp_path / "vectors_keys.parquet")
    assert keys.column_names == ["id", "day"]
    assert keys["id"].to_pylist() == [f"k{row}" for row in range(90)]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
@pytest.mark.parametrize("binary", [False, True])
def test_faiss_finds_each_row_first(tmp_path: Path, kind: Any, binary: bool) -> None:
    faiss = pytest.importorskip("faiss")
    paths, vectors = shards(tmp_path, np.uint8 if binary else np.float32)
    export(paths, "embedding", tmp_path, ExportSettings(faiss=kind), binary=binary)
    read = faiss.read_index_binary if binary else faiss.read_index
    index = read(str(tmp_path / "vectors.faiss"))
    assert index.ntotal == 90
    distances, found = index.search(np.ascontiguousarray(vectors), 1)
    if binary:
        assert (distances[:, 0] == 0).mean() > 0.95
    else:
        assert (found[:, 0] == np.arange(90)).mean() > 0.95
    assert (tmp_path / "vectors_keys.parquet").is_file()


def test_lance_has_every_column(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    paths, vectors = shards(tmp_path)
    for _ in range(2):  # a second time over the first
        export(paths, "embedding", tmp_path, ExportSettings(lance=True))
    dataset = lance.dataset(str(tmp_path / "vectors.lance"))
    assert dataset.count_rows() == 90
    near = dataset.to_table(nearest={"column": "embedding", "q": vectors[7], "k": 1})
    assert near["id"].to_pylist() == ["k7"]


def test_a_feature_table_has_a_folder_a_day(tmp_path: Path) -> None:
    import pyarrow.dataset as ds

    table = pa.table({
        "id": ["a", "b", "c", "d"], "seen": ["2026-11-27T08:00:00", "2026-11-28", None, "2026-11-27 09:00"],
        "embedding": pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2)),
    })  # fmt: skip
    path = tmp_path / "s.parquet"
    pq.write_table(table, path)
    made = export([path], "embedding", tmp_path, ExportSettings(features_by_day="seen"))
    assert made == {"features": "features"}
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == ["day=2026-11-27", "day=2026-11-28", "day=none"]
    found = ds.dataset(tmp_path / "features", partitioning="hive").to_table(filter=ds.field("day") == "2026-11-27")
    assert sorted(found["id"].to_pylist()) == ["a", "d"]
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 2)
    with pytest.raises(DataError, match="there is no column day_seen; it has id, seen, embedding"):
        export([path], "embedding", tmp_path, ExportSettings(features_by_day="day_seen"))
    with pytest.raises(DataError, match="id holds 'a', which does not begin with a date"):
        export([path], "embedding", tmp_path, ExportSettings(features_by_day="id"))


def test_a_package_that_is_not_there_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("faiss", "lance"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match=r"faiss is not installed.*llmkit\[faiss\]"):
        check_installed(ExportSettings(faiss="flat"))
    with pytest.raises(MissingError, match=r"pylance is not installed.*llmkit\[lance\]"):
        check_installed(ExportSettings(lance=True))
