"""What counts as complete in the store: a unit (a file, or a folder with all its files) whose marker was written.

The marker ``.complete/<unit>.json`` lists names, sizes and digests, and is written after all of them. The parts that other machines
have of a unit are announced by markers of their own, which the first machine puts into its one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llmkit.mirror.store import Store

MARKERS = ".complete"
PARTS = ".parts"


@dataclass(frozen=True)
class File:
    """``size`` in bytes."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        with path.open("rb") as stream:
            return cls(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


@dataclass(frozen=True)
class Marker:
    """``files`` by their names in the run's folder."""

    unit: str
    files: Mapping[str, File]

    @classmethod
    def parse(cls, data: bytes) -> Marker:
        """Raises ValueError, TypeError or KeyError where it is damaged."""
        raw = json.loads(data)
        return cls(raw["unit"], {name: File(**file) for name, file in raw["files"].items()})

    def to_bytes(self) -> bytes:
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        return json.dumps({"unit": self.unit, "files": files}, indent=1, ensure_ascii=False).encode()

    def problem(self, sizes: Mapping[str, int]) -> str:
        """What the store lacks of it, ``""`` for nothing."""
        for name, file in self.files.items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != file.size:
                return f"{name} has {sizes[name]:,} bytes instead of {file.size:,}"
        return ""


def marker_of(unit: str) -> str:
    return f"{MARKERS}/{unit}.json"


def part_of(unit: str, node: int) -> str:
    return f"{PARTS}/{unit}/node-{node}.json"


def unit_of(marker: str) -> str | None:
    """The unit that an object is the marker of; None for any other object."""
    if not (marker.startswith(f"{MARKERS}/") and marker.endswith(".json")):
        return None
    return marker.removeprefix(f"{MARKERS}/").removesuffix(".json")


def loose(name: str) -> bool:
    """Whether an object is a small file of the run's state, right below its folder."""
    return "/" not in name and not name.startswith(".")


@dataclass(frozen=True)
class Contents:
    """What lies in the store: ``units`` are complete, ``damaged`` says of others that have a marker what is wrong."""

    sizes: Mapping[str, int]
    units: Mapping[str, Marker]
    damaged: Mapping[str, str]

    @classmethod
    def of(cls, store: Store) -> Contents:
        sizes = store.sizes()
        units: dict[str, Marker] = {}
        damaged: dict[str, str] = {}
        for name, data in store.read_many(n for n in sizes if unit_of(n) is not None).items():
            unit = str(unit_of(name))
            try:
                marker = Marker.parse(data)
                why = marker.problem(sizes)
            except (ValueError, TypeError, KeyError):
                why = "its marker is damaged"
            if why:
                damaged[unit] = why
            else:
                units[unit] = marker
        return cls(sizes, units, damaged)

    @property
    def loose(self) -> list[str]:
        return sorted(name for name in self.sizes if loose(name))
