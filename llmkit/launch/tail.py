"""A log file that grows, read piece by piece."""

from __future__ import annotations

import codecs
from pathlib import Path


class Tail:
    """``more`` gives what was written since the last call, whole characters only; a file that is not there yet is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def more(self) -> str:
        return self._decode(self._bytes())

    def rest(self) -> str:
        """The same at the end, when no more bytes will come."""
        return self._decode(self._bytes(), True)

    def _bytes(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data
