"""Where a job keeps what is done: Parquet shards, and ``shards.jsonl``, a line for each shard that is complete.

A shard is written beside its place, flushed and renamed; then its line is added and flushed. What has no line is computed
anew. The first line says what the shards were computed with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.files import flush

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER, JOURNAL = "shards", "shards.jsonl"


@dataclass(frozen=True)
class Shard:
    """A complete shard. ``read`` input rows became ``rows`` output rows; ``errors`` are ``[position, row id, reason]``,
    ``dropped`` the same of rows that a setting leaves out; ``sha256`` is of the file."""

    name: str
    read: int
    rows: int
    sha256: str
    tokens: int = 0
    duplicates: int = 0
    seconds: float = 0.0
    errors: Sequence[tuple[int, str, str]] = ()
    dropped: Sequence[tuple[int, str, str]] = ()


@dataclass
class Store:
    """The shards of one run folder. ``done`` holds them by number, without gaps but for damaged ones."""

    folder: Path
    done: dict[int, Shard] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> Store:
        """The store of a job, empty or with what an earlier start has done. UsageError for shards of another identity."""
        store = cls(folder)
        (folder / FOLDER).mkdir(exist_ok=True)
        journal = folder / JOURNAL
        said = json.loads(json.dumps(identity))
        lines = _lines(journal)
        if not lines:
            _write(journal, [{"identity": said}])
            return store
        old = lines[0].get("identity", {})
        if old != said:
            keys = sorted(k for k in old.keys() | said.keys() if old.get(k) != said.get(k))
            raise UsageError(
                f"{folder} holds shards of another job: {', '.join(keys)} changed. Give another --output-dir, or "
                "--resume never (the old folder is kept under another name)."
            )
        for line in lines[1:]:
            store._take(line)
        _write(journal, [lines[0], *({"number": n, **asdict(s)} for n, s in sorted(store.done.items()))])
        for path in (folder / FOLDER).glob(".*"):  # half of a shard, from a start that was killed
            path.unlink()
        return store

    def _take(self, line: dict[str, Any]) -> None:
        number = int(line.pop("number"))
        fields: dict[str, Any] = {k: _tuples(v) if isinstance(v, list) else v for k, v in line.items()}
        shard = Shard(**fields)
        path = self.path(number)
        if path.is_file() and file_digest(path) == shard.sha256:
            self.done[number] = shard
        else:
            self.damaged.append(path.name)

    def path(self, number: int) -> Path:
        return self.folder / FOLDER / f"part-{number:05}.parquet"

    def paths(self) -> list[Path]:
        """The complete shards in the order of their rows."""
        return [self.path(number) for number in sorted(self.done)]

    def write(self, number: int, table: pa.Table) -> str:
        """Put a shard in its place, and give its digest."""
        import pyarrow.parquet as pq

        path = self.path(number)
        part = path.with_name(f".{path.name}")
        with part.open("wb") as file:
            pq.write_table(table, file, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        digest = file_digest(part)
        part.replace(path)
        flush(path.parent)
        return digest

    def add(self, number: int, shard: Shard) -> None:
        """Note a shard as complete."""
        line = json.dumps({"number": number, **asdict(shard)}, ensure_ascii=False)
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[number] = shard


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tuples(rows: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(row) for row in rows)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal; one that a crash cut off is not a line."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def write_atomic(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    flush(path.parent)


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
