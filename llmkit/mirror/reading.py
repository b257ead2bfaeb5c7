"""Looking at a run's folder in a store without claiming it: for commands that read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmkit.errors import MissingError, UsageError
from llmkit.mirror.journal import Journal
from llmkit.mirror.pull import fetch, fetch_loose
from llmkit.mirror.store import Store
from llmkit.mirror.units import Contents
from llmkit.uris import mistake, workplace


@contextmanager
def peek(uri: str, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder with those small files of the run that exist."""
    store = _store(uri)
    with tempfile.TemporaryDirectory(prefix="llmkit-") as temporary:
        for name, data in store.read_many(names).items():
            (Path(temporary) / name).write_bytes(data)
        yield Path(temporary)


def fetched(uri: str, units: Sequence[str], *, note: Callable[[str], None]) -> Path:
    """A folder of this machine with the run's small files and the first of ``units`` that is complete in the store.

    It lies beside the run's scratch folder, which may be older or in use. Raises MissingError where there is none.
    """
    store = _store(uri)
    contents = Contents.of(store)
    found = next((contents.units[unit] for unit in units if unit in contents.units), None)
    if found is None:
        raise MissingError(f"{store.uri} holds no complete {' or '.join(units)}.")
    scratch = workplace(store.uri)
    folder = scratch.with_name(f"{scratch.name}.copy")
    folder.mkdir(parents=True, exist_ok=True)
    note(f"Copying {store.uri}/{found.unit} to {folder}")
    journal = Journal(folder, store.uri)
    for name in contents.loose:
        fetch_loose(store, folder, name, journal)
    fetch(store, folder, found, journal)
    return folder


def _store(uri: str) -> Store:
    if why := mistake(uri):
        raise UsageError(f"{uri} {why}.")
    return Store(uri)
