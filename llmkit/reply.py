"""What a command of the command line answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reply:
    """``text`` is for people, on stdout; ``data`` is what ``--json`` prints in its place, as one JSON object."""

    text: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
