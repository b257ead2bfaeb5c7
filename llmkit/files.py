"""Files that are on the disk when the call returns, and where llmkit keeps its own."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, out to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where the user's caches of llmkit are: ``LLMKIT_CACHE``, else ``XDG_CACHE_HOME/llmkit``, else ``~/.cache/llmkit``."""
    named = os.environ.get("LLMKIT_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmkit"
