"""Tokenized rows in one memory-mapped Arrow file, seen as flat numpy arrays.

The file appears complete or not at all (written beside, flushed to disk, renamed), and a checksum in it tells a damaged
one when it is opened.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmkit.data.rows import Encoded

VERSION = 1
_META = b"llmkit.tokens"
_WHOLE = 1 << 28


class DamagedStoreError(Exception):
    """The file is no complete token store; it has to be made again."""


class TokenStore:
    """Rows of tokens. Causal: ``labels`` is aligned with ``input_ids``, not shifted, -100 where nothing is learned;
    sequence-to-sequence: ``labels`` has offsets of its own.

    ``input_ids``, ``labels`` int32, flat; ``offsets``, ``label_offsets`` int64 of ``len(store) + 1``; ``lengths`` int64.
    The arrays are read-only views of the mapped file.
    """

    def __init__(self, path: Path) -> None:
        """Raises DamagedStoreError when the file is cut, changed, or of another version; FileNotFoundError without one."""
        self.path = path
        try:
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
            meta = json.loads(batch.schema.metadata[_META])
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedStoreError(f"{path}: {' '.join(str(error).split())[:200]}") from None
        if meta.get("version") != VERSION or meta.get("rows") != batch.num_rows or meta.get("size") is None:
            raise DamagedStoreError(f"{path}: its header does not fit its rows")
        self._row_ids: Any = batch.column("row_id")
        self.input_ids, self.offsets = _flat(batch.column("input_ids"))
        self.labels, self.label_offsets = _flat(batch.column("labels"))
        if _checksum(self.offsets, self.label_offsets, self.input_ids, self.labels) != meta["checksum"]:
            raise DamagedStoreError(f"{path}: its checksum does not fit its tokens")
        self.tokens: int = len(self.input_ids)
        self.supervised: int = int(meta["supervised"])
        self.lengths: NDArray[np.int64] = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row_id(self, index: int) -> str:
        """``file:line`` of a row."""
        return str(self._row_ids[index].as_py())

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """``(input_ids, labels)`` of one row."""
        a, b = self.offsets[index], self.offsets[index + 1]
        c, d = self.label_offsets[index], self.label_offsets[index + 1]
        return self.input_ids[a:b], self.labels[c:d]


def _flat(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    values = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(values) or np.any(np.diff(offsets) < 0):
        raise DamagedStoreError("offsets that do not fit the tokens")
    return values, offsets


def _checksum(*arrays: NDArray[Any]) -> int:
    """CRC of all bytes; of arrays above 256 MB, of the first 4 KB in every MB."""
    crc = 0
    for array in arrays:
        data = np.ascontiguousarray(array).view(np.uint8)
        if len(data) <= _WHOLE:
            crc = zlib.crc32(data.data, crc)
        else:
            for start in range(0, len(data), 1 << 20):
                crc = zlib.crc32(data[start : start + 4096].data, crc)
    return crc


class TokenWriter:
    """Collects encoded rows in plain files beside the store, so that memory holds one chunk at a time.

    ``finish`` turns them into the Arrow file. The folder is the writer's own.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._ids_path, self._labels_path = folder / f"{name}.ids", folder / f"{name}.labels"
        self._ids_path.write_bytes(b"")
        self._labels_path.write_bytes(b"")
        self.row_ids: list[str] = []
        self.lengths: list[int] = []
        self.label_lengths: list[int] = []

    def append(self, rows: Iterable[Encoded]) -> None:
        """Add rows, in order."""
        rows = list(rows)
        if not rows:
            return
        self.row_ids += [row.row_id for row in rows]
        self.lengths += [len(row.input_ids) for row in rows]
        self.label_lengths += [len(row.labels) for row in rows]
        with self._ids_path.open("ab") as stream:
            stream.write(np.concatenate([row.input_ids for row in rows]).data)
        with self._labels_path.open("ab") as stream:
            stream.write(np.concatenate([row.labels for row in rows]).data)

    def finish(self, path: Path, order: NDArray[np.int64] | None = None) -> None:
        """Write the Arrow file: the rows by number in ``order`` (repeats allowed), or all of them as they came."""
        ids, labels = _mapped(self._ids_path), _mapped(self._labels_path)
        offsets, label_offsets = _offsets(self.lengths), _offsets(self.label_lengths)
        row_ids = self.row_ids
        if order is not None:
            ids, offsets = _gather(ids, offsets, order, self._ids_path)
            labels, label_offsets = _gather(labels, label_offsets, order, self._labels_path)
            row_ids = [row_ids[index] for index in order.tolist()]
        _write(path, row_ids, ids, offsets, labels, label_offsets)


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, dtype=np.int64))])


def _mapped(path: Path) -> NDArray[np.int32]:
    if path.stat().st_size == 0:
        return np.empty(0, np.int32)
    return np.memmap(path, dtype=np.int32, mode="r")


def _gather(
    flat: NDArray[np.int32], offsets: NDArray[np.int64], order: NDArray[np.int64], base: Path
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Rows of a flat array in another order, through a file: ``(flat, offsets)``."""
    path = base.with_suffix(base.suffix + ".ordered")
    with path.open("wb") as stream:
        for start in range(0, len(order), 10_000):
            pieces = [flat[offsets[row] : offsets[row + 1]] for row in order[start : start + 10_000].tolist()]
            stream.write(np.concatenate(pieces).tobytes())
    return _mapped(path), _offsets((offsets[order + 1] - offsets[order]).tolist())


def _write(
    path: Path,
    row_ids: list[str],
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    labels: NDArray[np.int32],
    label_offsets: NDArray[np.int64],
) -> None:
    meta = {
        "version": VERSION,
        "rows": len(row_ids),
        "size": len(ids),
        "supervised": int(np.count_nonzero(labels != -100)),
        "checksum": _checksum(offsets, label_offsets, ids, labels),
    }
    columns = [pa.array(row_ids, pa.large_string()), _list(ids, offsets), _list(labels, label_offsets)]
    schema = pa.schema(
        [pa.field("row_id", pa.large_string())]
        + [pa.field(name, pa.large_list(pa.int32())) for name in ("input_ids", "labels")],
        metadata={_META: json.dumps(meta).encode()},
    )
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        with pa.ipc.new_file(stream, schema) as writer:
            writer.write_batch(batch)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _list(values: NDArray[np.int32], offsets: NDArray[np.int64]) -> Any:
    return pa.LargeListArray.from_arrays(
        pa.Array.from_buffers(pa.int64(), len(offsets), [None, pa.py_buffer(offsets)]),
        pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]),
        type=pa.large_list(pa.int32()),
    )
