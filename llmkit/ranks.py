"""One run started as several processes: rank 0 prepares the folder, the others wait for what it decided."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from llmkit.errors import MissingError, UsageError

WAIT = timedelta(minutes=30)
"""Rank 0 may have to digest large local files first."""


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """RANK and WORLD_SIZE, as torchrun, accelerate and DeepSpeed set them. ``UsageError`` where they are wrong."""
        raw = {key: os.environ.get(key, default) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        try:
            rank, world = int(raw["RANK"]), int(raw["WORLD_SIZE"])
        except ValueError:
            raise UsageError(f"RANK and WORLD_SIZE must be whole numbers, not {raw}.") from None
        if not 0 <= rank < world:
            raise UsageError(f"RANK={rank} is not below WORLD_SIZE={world}. Start the processes with torchrun.")
        return cls(rank, world)


class Meeting:
    """A key-value store that all ranks of one start share: the same one a process group would be opened over.

    ``tell`` is rank 0's, ``hear`` the others'. No process group is opened.
    """

    def __init__(self, ranks: Ranks) -> None:
        missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(k)]
        if missing:
            raise UsageError(f"WORLD_SIZE={ranks.world_size} but {' and '.join(missing)} not set. Use torchrun.")
        import torch.distributed as dist

        store, _, _ = next(iter(dist.rendezvous("env://", timeout=WAIT)))  # type: ignore[attr-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = dist.PrefixStore(f"llmkit/{attempt}", store)  # type: ignore[attr-defined]

    def tell(self, message: Mapping[str, Any]) -> None:
        self._store.set("prepared", json.dumps(message))

    def hear(self) -> dict[str, Any]:
        """``MissingError`` where rank 0 does not answer."""
        try:
            data: dict[str, Any] = json.loads(self._store.get("prepared"))
        except RuntimeError as exc:
            raise MissingError(f"Rank 0 did not say what to do: {exc}") from exc
        return data
