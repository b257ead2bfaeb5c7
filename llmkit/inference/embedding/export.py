"""The finished vectors in the forms that vector databases and feature stores take: ``.npy``, Lance, FAISS.

All are made from the Parquet shards, a shard at a time, and appear whole: they are written beside and renamed. Lance and
FAISS come with the extras ``lance`` and ``faiss``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmkit.errors import DataError, MissingError
from llmkit.inference.embedding.settings import ExportSettings

VECTORS, KEYS = "vectors.npy", "vectors_keys.parquet"
LANCE, FAISS, FEATURES = "vectors.lance", "vectors.faiss", "features"
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_HNSW_LINKS = 32
_TRAIN_ROWS = 100_000
_FEWEST_ROWS_A_LIST = 39
"""FAISS wants so many training vectors for each list of an inverted file."""


def check_installed(settings: ExportSettings) -> None:
    """Raises MissingError for a package that an export needs, before anything is computed."""
    if settings.lance:
        _lance()
    if settings.faiss is not None:
        _faiss()


def export(
    shards: Sequence[Path], column: str, folder: Path, settings: ExportSettings, *, binary: bool = False
) -> dict[str, str]:
    """Write what ``settings`` asks for into ``folder``; gives the files by name. ``binary`` vectors are packed bits."""
    made: dict[str, str] = {}
    if settings.npy or settings.faiss is not None:
        write_keys(shards, column, folder / KEYS)
        made["vectors_keys"] = KEYS
    if settings.npy:
        write_npy(shards, column, folder / VECTORS)
        made["vectors_npy"] = VECTORS
    if settings.lance:
        write_lance(shards, folder / LANCE)
        made["vectors_lance"] = LANCE
    if settings.faiss is not None:
        write_faiss(shards, column, folder / FAISS, settings.faiss, binary=binary)
        made["vectors_faiss"] = FAISS
    if settings.features_by_day is not None:
        write_by_day(shards, settings.features_by_day, folder / FEATURES)
        made["features"] = FEATURES
    return made


def write_by_day(shards: Sequence[Path], column: str, folder: Path) -> None:
    """A Parquet data set with a folder a day (``day=2026-11-27``); rows without a date are in ``day=none``.

    Raises DataError where the column was not carried along, or holds something else than dates.
    """
    names = pq.read_schema(shards[0]).names
    if column not in names or "day" in names:
        there = ", ".join(names)
        what = "there is a column `day` already" if column in names else f"there is no column {column}; it has {there}"
        raise DataError(f"export.features_by_day: in the output {what}")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for number, shard in enumerate(shards):
        table = pq.read_table(shard)
        table = table.append_column("day", _days(table[column], column))
        for day in sorted(set(table["day"].to_pylist())):
            target = part / f"day={day}"
            target.mkdir(parents=True, exist_ok=True)
            rows = table.filter(pc.equal(table["day"], day)).drop_columns(["day"])
            pq.write_table(rows, target / f"part-{number:05d}.parquet")
    part.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def _days(values: pa.ChunkedArray, column: str) -> pa.Array:
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        days = pc.strftime(values, format="%Y-%m-%d").to_pylist()
    else:
        days = [value if value is None else str(value)[:10] for value in values.to_pylist()]
    wrong = next((day for day in days if day is not None and not _DAY.fullmatch(day)), None)
    if wrong is not None:
        raise DataError(
            f"export.features_by_day: {column} holds {wrong!r}, which does not begin with a date (2026-11-27)"
        )
    return pa.array([day or "none" for day in days], pa.string())


def write_npy(shards: Sequence[Path], column: str, path: Path) -> None:
    """All vectors ``[rows, dim]`` in numpy's format, which ``numpy.load(path, mmap_mode="r")`` maps without reading."""
    rows = sum(pq.read_metadata(shard).num_rows for shard in shards)
    part = path.with_name(f".{path.name}.part")
    whole: Any = None
    start = 0
    for vectors in _vectors(shards, column):
        if whole is None:
            shape = (rows, vectors.shape[1])
            whole = np.lib.format.open_memmap(part, "w+", dtype=vectors.dtype, shape=shape)  # type: ignore[no-untyped-call]
        whole[start : start + len(vectors)] = vectors
        start += len(vectors)
    if whole is None:
        with part.open("wb") as stream:
            np.save(stream, np.zeros((0, 0), dtype=np.float32))
    else:
        whole.flush()
        del whole
    part.replace(path)


def write_keys(shards: Sequence[Path], column: str, path: Path) -> None:
    """The columns beside the vectors (keys, timestamps, lineage) in the vectors' order."""
    part = path.with_name(f".{path.name}.part")
    writer: pq.ParquetWriter | None = None
    for shard in shards:
        table = pq.read_table(shard)
        table = table.drop_columns([column])
        writer = writer or pq.ParquetWriter(part, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
        part.replace(path)


def write_lance(shards: Sequence[Path], path: Path) -> None:
    """All columns as a Lance dataset; vectors are a fixed-size list, as its indexes want them."""
    lance = _lance()
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    schema = pq.read_schema(shards[0])
    batches = (batch for shard in shards for batch in pq.ParquetFile(shard).iter_batches())
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(part))
    shutil.rmtree(path, ignore_errors=True)
    part.replace(path)


def write_faiss(shards: Sequence[Path], column: str, path: Path, kind: str, *, binary: bool) -> None:
    """An index by inner product (cosine, as vectors are of unit length); packed bits by Hamming distance.

    ``ivf`` has as many lists as the square root of the rows; it is trained on the first 100,000 rows.
    """
    faiss = _faiss()
    index: Any = None
    for vectors in _vectors(shards, column):
        if index is None:
            rows = sum(pq.read_metadata(shard).num_rows for shard in shards)
            index = (
                _binary_index(faiss, kind, vectors.shape[1] * 8, rows) if binary else _index(faiss, kind, vectors, rows)
            )
            if not index.is_trained:
                index.train(_first_rows(shards, column, np.uint8 if binary else np.float32))
        index.add(np.ascontiguousarray(vectors, dtype=np.uint8 if binary else np.float32))
    if index is None:
        return
    part = path.with_name(f".{path.name}.part")
    (faiss.write_index_binary if binary else faiss.write_index)(index, str(part))
    part.replace(path)


def _index(faiss: Any, kind: str, vectors: np.ndarray, rows: int) -> Any:
    dim, inner = vectors.shape[1], faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        return faiss.IndexHNSWFlat(dim, _HNSW_LINKS, inner)
    if kind == "ivf":
        return faiss.index_factory(dim, f"IVF{_lists(rows)},Flat", inner)
    return faiss.IndexFlatIP(dim)


def _binary_index(faiss: Any, kind: str, bits: int, rows: int) -> Any:
    if kind == "hnsw":
        return faiss.IndexBinaryHNSW(bits, _HNSW_LINKS)
    if kind == "ivf":
        return faiss.index_binary_factory(bits, f"BIVF{_lists(rows)}")
    return faiss.IndexBinaryFlat(bits)


def _lists(rows: int) -> int:
    return max(1, min(int(rows**0.5), rows // _FEWEST_ROWS_A_LIST))


def _first_rows(shards: Sequence[Path], column: str, kind: Any) -> np.ndarray:
    found: list[np.ndarray] = []
    for vectors in _vectors(shards, column):
        found.append(vectors)
        if sum(map(len, found)) >= _TRAIN_ROWS:
            break
    return np.ascontiguousarray(np.concatenate(found)[:_TRAIN_ROWS], dtype=kind)


def _vectors(shards: Sequence[Path], column: str) -> Iterator[np.ndarray]:
    """Vectors ``[rows, dim]`` of each shard that has rows."""
    for shard in shards:
        chunks = pq.read_table(shard, columns=[column]).column(column).combine_chunks()
        lists = chunks if isinstance(chunks, pa.Array) else pa.concat_arrays(chunks.chunks)
        if len(lists):
            yield lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise MissingError.extra("pylance", "lance") from None
    return lance


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingError.extra("faiss", "faiss") from None
    return faiss
