"""The last steps of a vector: fewer dimensions, unit length, and the type in which it is kept.

``int8`` and ``binary`` are those of sentence-transformers' ``quantize_embeddings``, but that ``binary`` keeps unsigned
bytes (its ``ubinary``), which is what FAISS and vector databases take.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmkit.errors import DataError, MissingError

Vectors = np.ndarray
_STEPS = 255


def finish(vectors: Vectors, truncate_dim: int | None, normalize: bool) -> Vectors:
    """``[rows, dim]`` float32 cut to the first ``truncate_dim`` dimensions, then of unit length where that is wanted."""
    kept = vectors[:, :truncate_dim]
    if normalize:
        kept = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(kept, dtype=np.float32)


def pack(vectors: Vectors, precision: str, ranges: Vectors | None = None) -> Vectors:
    """Vectors ``[rows, dim]`` in the type that is kept; ``binary`` is ``[rows, dim / 8]`` of unsigned bytes."""
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision == "binary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "int8":
        if ranges is None:
            raise ValueError("int8 needs ranges")
        steps = (ranges[1] - ranges[0]) / _STEPS
        steps = np.where(steps == 0, 1, steps)
        level: Vectors = np.clip(np.floor((vectors - ranges[0]) / steps), 0, _STEPS)
        return (level - 128).astype(np.int8)
    return vectors


def unpack(kept: Vectors, ranges: Vectors) -> Vectors:
    """What ``int8`` vectors stand for, each value in the middle of its step."""
    steps = (ranges[1] - ranges[0]) / _STEPS
    found: Vectors = (kept.astype(np.float32) + 128.5) * steps + ranges[0]
    return found


def ranges_of(vectors: Vectors) -> Vectors:
    """Lowest and highest value of each dimension, ``[2, dim]``."""
    return np.stack([vectors.min(0), vectors.max(0)]).astype(np.float32)


def read_ranges(path: str | Path, dim: int) -> Vectors:
    """Ranges that an earlier run wrote. MissingError where there is no such file, DataError for another shape."""
    file = Path(path)
    if not file.is_file():
        raise MissingError(f"embedding.int8_ranges: there is no file {path}")
    try:
        found: Vectors = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no array of numpy: {error}") from error
    if found.shape != (2, dim) or not np.isfinite(found).all():
        raise DataError(f"{path} holds {list(found.shape)}; ranges for these vectors are [2, {dim}], all finite")
    return found.astype(np.float32)
