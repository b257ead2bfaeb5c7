"""From the store into the scratch folder: what a run needs to go on, each file checked against its digest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from llmkit.errors import StoreError
from llmkit.files import flush
from llmkit.mirror.journal import Journal
from llmkit.mirror.store import Store
from llmkit.mirror.units import Contents, File, Marker

LOCK, RESULT = ".lock", "result.json"
_LOCKS = (LOCK, ".job.lock")
REMADE = ("model", "adapter")
"""What a run that is not finished makes anew at its end."""

_CHECKPOINT = re.compile(r"(.*/)?checkpoint-(\d+)$")


def pull(store: Store, folder: Path, journal: Journal, note: Callable[[str], None]) -> Contents:
    """Make ``folder`` hold what the store says of the run: of checkpoints the newest complete one, of a finished run
    only the small files. Older work in it that never reached the store is put aside."""
    contents = Contents.of(store)
    clear(folder, journal, note)
    for unit, why in sorted(contents.damaged.items()):
        note(f"{unit} in {store.uri} is not complete ({why}) and is passed over")
    for name in contents.loose:
        fetch_loose(store, folder, name, journal)
    if not _done(folder):
        for unit in wanted(contents.units):
            fetch(store, folder, contents.units[unit], journal)
    return contents


def wanted(units: Iterable[str]) -> list[str]:
    """The units that an unfinished run goes on with."""
    numbered = {unit: int(found.group(2)) for unit in units if (found := _CHECKPOINT.fullmatch(unit))}
    newest = max(numbered, key=lambda unit: numbered[unit], default=None)
    return sorted(unit for unit in units if unit == newest or (unit not in numbered and unit not in REMADE))


def fetch(store: Store, folder: Path, marker: Marker, journal: Journal) -> None:
    """Have a unit in ``folder``. Raises StoreError where the store gives something else than the marker says."""
    for name, file in marker.files.items():
        target = folder / name
        if not (target.is_file() and File.of(target) == file):
            target.parent.mkdir(parents=True, exist_ok=True)
            _download(store, name, target, file)
        journal.note(name, file)


def _download(store: Store, name: str, target: Path, expected: File | None) -> None:
    beside = target.with_name(f".{target.name}.pull")
    try:
        if not store.download(name, beside):
            raise StoreError(f"{store.uri}/{name} is gone.")
        if expected is not None and File.of(beside) != expected:
            raise StoreError(f"{store.uri}/{name} is not the file that was uploaded: its digest is another one.")
        flush(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def fetch_loose(store: Store, folder: Path, name: str, journal: Journal) -> None:
    target = folder / name
    _download(store, name, target, None)
    journal.note(name, File.of(target), target.stat().st_mtime_ns)


def _done(folder: Path) -> bool:
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("status") == "done"


def clear(folder: Path, journal: Journal, note: Callable[[str], None]) -> None:
    """Empty the folder of an older session; the lock stays where it is."""
    old = [entry for entry in folder.iterdir() if entry.name not in _LOCKS]
    if _unsent(folder, journal):
        aside = _free(folder)
        aside.mkdir()
        note(f"What {folder} held and had not uploaded before the run went on elsewhere is kept in {aside}")
        for entry in old:
            entry.rename(aside / entry.name)
    for entry in folder.iterdir():
        if entry.name not in _LOCKS:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    journal.sent.clear()


def _unsent(folder: Path, journal: Journal) -> bool:
    """Whether there is work (a file in a folder) that the store never got."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and len(name.parts) > 1 and not any(part.startswith(".") for part in name.parts):
            found = journal.sent.get(name.as_posix())
            if name.parts[0] != "logs" and (found is None or found.size != path.stat().st_size):
                return True
    return False


def _free(folder: Path) -> Path:
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return target
