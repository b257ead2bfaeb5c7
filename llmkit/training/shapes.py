"""Few shapes: the matrix library compiles a kernel for every shape that it meets, and keeps it."""

from __future__ import annotations

ROUND = 32
"""Flat sequences, blocks of attention and chunks of the loss are a multiple of this many positions."""

CPU_PART_TOKENS = 2048
"""Tokens that go through the model at once on a CPU: more take more memory and save no time."""


def rounded_up(count: int) -> int:
    """The next multiple of ``ROUND``."""
    return -(-count // ROUND) * ROUND
