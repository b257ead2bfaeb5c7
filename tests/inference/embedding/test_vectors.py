"""What is kept of a vector: sentence-transformers' int8 and binary, fewer dimensions, ranges from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmkit.errors import DataError, MissingError
from llmkit.inference.embedding.vectors import finish, pack, ranges_of, read_ranges, unpack

VECTORS = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32)


@pytest.mark.parametrize(("precision", "theirs"), [("int8", "int8"), ("binary", "ubinary")])
def test_packed_vectors_are_those_of_sentence_transformers(precision: str, theirs: str) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    ranges = ranges_of(VECTORS[:150])
    expected = quantize_embeddings(VECTORS, precision=theirs, ranges=ranges)  # type: ignore[arg-type]
    found = pack(VECTORS, precision, ranges)
    assert found.dtype == expected.dtype
    assert (found == expected).all()


def test_int8_can_be_read_back() -> None:
    ranges = ranges_of(VECTORS)
    found = unpack(pack(VECTORS, "int8", ranges), ranges)
    step = (ranges[1] - ranges[0]) / 255
    assert (np.abs(found - VECTORS) <= step * 0.51).mean() > 0.999


def test_float16_and_fewer_dimensions() -> None:
    assert pack(VECTORS, "float16").dtype == np.float16
    assert finish(VECTORS, 8, False).shape == (200, 8)
    assert np.allclose(np.linalg.norm(finish(VECTORS, 8, True), axis=1), 1, atol=1e-6)
    assert finish(np.zeros((1, 4), dtype=np.float32), None, True).tolist() == [[0, 0, 0, 0]]


def test_ranges_of_an_earlier_run(tmp_path: Path) -> None:
    np.save(tmp_path / "int8_ranges.npy", ranges_of(VECTORS))
    assert (read_ranges(tmp_path / "int8_ranges.npy", 24) == ranges_of(VECTORS)).all()
    with pytest.raises(DataError, match=r"holds \[2, 24\]; ranges for these vectors are \[2, 12\]"):
        read_ranges(tmp_path / "int8_ranges.npy", 12)
    with pytest.raises(MissingError, match="no file"):
        read_ranges(tmp_path / "no.npy", 24)
    (tmp_path / "x.npy").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="no array of numpy"):
        read_ranges(tmp_path / "x.npy", 24)
