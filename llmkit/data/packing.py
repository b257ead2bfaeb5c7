"""Putting rows into sequences of a fixed length: best-fit decreasing over whole rows, nothing cut."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.integer], capacity: int) -> list[NDArray[np.int64]]:
    """Bins of row numbers, the sum of lengths in each at most ``capacity``; deterministic.

    Longest rows first; each goes into the fullest bin that has room for it, else opens a new one. The occupied amounts
    of free room are the set bits of one big integer, so the tightest bin is found by its lowest bit at or above the
    length. A million rows take a second or two. Raises ValueError for a length below 1 or above ``capacity``.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return []
    if int(lengths.min()) < 1 or int(lengths.max()) > capacity:
        raise ValueError(f"lengths must be 1 to {capacity}, found {int(lengths.min())} to {int(lengths.max())}")
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows = order.tolist()
    values, starts = np.unique(-lengths[order].astype(np.int64), return_index=True)
    ends = [*starts[1:].tolist(), len(rows)]
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for length, start, end in zip((-values).tolist(), starts.tolist(), ends, strict=True):
        at = start
        while at < end:
            above = rooms >> length
            if above:
                room = length + (above & -above).bit_length() - 1
                number = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
            else:
                room, number = capacity, len(bins)
                bins.append([])
            # after one row of this length the bin is the tightest still, so it takes as many as fit
            taken = min(room // length, end - at)
            bins[number] += rows[at : at + taken]
            at += taken
            room -= taken * length
            if room:
                by_room.setdefault(room, []).append(number)
                rooms |= 1 << room
    return [np.array(rows_of_bin, dtype=np.int64) for rows_of_bin in bins]


def efficiency(lengths: NDArray[np.integer], bins: int, capacity: int) -> float:
    """Share of the packed positions that hold a token, 0 to 1."""
    return float(np.sum(lengths, dtype=np.int64)) / (bins * capacity) if bins else 0.0
