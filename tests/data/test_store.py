"""The token store: what was written is what is mapped, and a damaged file is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmkit.data.rows import Encoded
from llmkit.data.store import DamagedStoreError, TokenStore, TokenWriter


def rows(seq2seq: bool = False) -> list[Encoded]:
    made = []
    for number in range(1, 6):
        ids = np.arange(number, dtype=np.int32)
        labels = np.arange(7, dtype=np.int32) if seq2seq else np.where(ids > 1, ids, -100).astype(np.int32)
        made.append(Encoded(f"f:{number}", ids, labels))
    return made


def write(folder: Path, made: list[Encoded], order: list[int] | None = None) -> Path:
    writer = TokenWriter(folder / "work", "train")
    writer.append(made[:2])
    writer.append([])
    writer.append(made[2:])
    writer.finish(folder / "train.arrow", None if order is None else np.array(order, dtype=np.int64))
    return folder / "train.arrow"


@pytest.mark.parametrize("seq2seq", [False, True])
def test_rows_come_back_as_they_were(seq2seq: bool, tmp_path: Path) -> None:
    made = rows(seq2seq)
    store = TokenStore(write(tmp_path, made))
    assert len(store) == 5
    assert store.tokens == 15 and store.supervised == (35 if seq2seq else 6)
    assert store.lengths.tolist() == [1, 2, 3, 4, 5]
    assert store.input_ids.dtype == store.labels.dtype == np.int32
    assert store.offsets.dtype == store.label_offsets.dtype == np.int64
    for index, row in enumerate(made):
        ids, labels = store.row(index)
        assert store.row_id(index) == row.row_id
        assert ids.tolist() == row.input_ids.tolist() and labels.tolist() == row.labels.tolist()
    assert not store.input_ids.flags.writeable
    assert not list(tmp_path.glob("*.partial"))


def test_rows_can_be_reordered_repeated_and_left_out(tmp_path: Path) -> None:
    store = TokenStore(write(tmp_path, rows(), [4, 0, 4]))
    assert [store.row_id(index) for index in range(3)] == ["f:5", "f:1", "f:5"]
    assert store.row(0)[0].tolist() == store.row(2)[0].tolist() == [0, 1, 2, 3, 4]


def test_no_rows_at_all(tmp_path: Path) -> None:
    store = TokenStore(write(tmp_path, rows(), []))
    assert len(store) == 0 and store.tokens == 0


def test_damage_anywhere_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    whole = path.read_bytes()
    for size in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedStoreError):
            TokenStore(path)
    tokens = np.arange(5, dtype=np.int32).tobytes()
    place = whole.index(tokens)
    changed = bytearray(whole)
    changed[place + 4] ^= 1
    path.write_bytes(changed)
    with pytest.raises(DamagedStoreError, match="checksum"):
        TokenStore(path)
    path.write_bytes(b"not arrow at all" * 100)
    with pytest.raises(DamagedStoreError):
        TokenStore(path)
    with pytest.raises(FileNotFoundError):
        TokenStore(tmp_path / "none.arrow")
