"""What a detector is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Match(NamedTuple):
    """A value inside a normalized text, and the form that all spellings of the same value share.

    ``canonical`` is what pseudonyms are made of. It stays inside the process and inside the call.
    """

    start: int
    end: int
    canonical: str


Finder = Callable[[str], Iterator[Match]]
"""Matches of one kind in a text as :func:`llmkit.data.guard.detectors.text.normalize` leaves it."""
