"""What a scratch folder knows of its store: which session wrote there last, and which files are there already."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmkit.mirror.units import File

JOURNAL = ".mirror.json"


@dataclass(frozen=True)
class Sent:
    """A file as it was when it was sent; times in nanoseconds."""

    size: int
    sha256: str
    changed: int = 0


@dataclass
class Journal:
    """``sessions`` are the owners under which this folder worked; the store's claim names the last that worked at all.

    ``sent`` holds what of this folder is in the store, by name; it is true as long as nobody else wrote there.
    """

    folder: Path
    uri: str
    sessions: list[str] = field(default_factory=list)
    sent: dict[str, Sent] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, uri: str) -> Journal:
        """A fresh one where there is none, or none that can be read: the store is asked for everything then."""
        try:
            raw = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            if raw["uri"] != uri:
                return cls(folder, uri)
            return cls(folder, uri, raw["sessions"], {name: Sent(**sent) for name, sent in raw["sent"].items()})
        except (OSError, ValueError, TypeError, KeyError):
            return cls(folder, uri)

    def save(self) -> None:
        beside = self.folder / f"{JOURNAL}.tmp"
        raw = {"uri": self.uri, "sessions": self.sessions, "sent": {n: asdict(s) for n, s in self.sent.items()}}
        beside.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
        beside.replace(self.folder / JOURNAL)

    def note(self, name: str, file: File, changed: int = 0) -> None:
        self.sent[name] = Sent(file.size, file.sha256, changed)

    def has(self, name: str, file: File) -> bool:
        found = self.sent.get(name)
        return found is not None and (found.size, found.sha256) == (file.size, file.sha256)

    def unchanged(self, name: str, path: Path) -> bool:
        """Whether the file is as it was when it was sent, by size and time."""
        found, now = self.sent.get(name), path.stat()
        return found is not None and (found.size, found.changed) == (now.st_size, now.st_mtime_ns)


def uri_of(folder: Path) -> str | None:
    """The URI that a folder is the scratch folder of; None for any other folder."""
    try:
        return str(json.loads((folder / JOURNAL).read_text(encoding="utf-8"))["uri"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
