"""Which events go into one batch, and what MLflow gets of them: names and values within its limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.tracking import limits
from llmkit.tracking.spool import Event, number_from_json

_BATCHED = ("metrics", "params", "tags", "start")
CHANGED = "llmkit.changed."


@dataclass(frozen=True)
class Point:
    """One value of a metric; ``time_ms`` since the epoch."""

    key: str
    value: float
    time_ms: int
    step: int


def collect(events: Iterable[Event]) -> list[Event]:
    """The next events that can be sent together: up to a call's worth of metrics and pairs, or one of another kind."""
    taken: list[Event] = []
    points = pairs = 0
    for event in events:
        if event.kind not in _BATCHED:
            return taken or [event]
        taken.append(event)
        points += len(event.body.get("metrics", ()))
        pairs += len(event.body.get("params", ())) + len(event.body.get("tags", ()))
        if points >= limits.METRICS_PER_CALL or pairs >= limits.PAIRS_PER_CALL:
            break
    return taken


@dataclass
class Batch:
    """Points, params and tags of some events. ``cut``: something had to be shortened or renamed.

    ``origin`` says at which offset the event of a ``(kind, key)`` begins.
    """

    origin: dict[tuple[str, str], int] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    params: list[tuple[str, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    started: bool = False
    cut: bool = False

    @classmethod
    def of(cls, events: Sequence[Event]) -> Batch:
        batch = cls()
        for event in events:
            batch.started = batch.started or event.kind == "start"
            for kind in ("metrics", "params", "tags"):
                batch.origin |= {(kind, limits.clean_key(key)): event.start for key in event.body.get(kind, ())}
            for key, value in event.body.get("metrics", {}).items():
                number = number_from_json(value)
                batch.points.append(Point(limits.clean_key(key), number, event.time_ms, int(event.body["step"])))
            for key, value in event.body.get("params", {}).items():
                batch.params.append((limits.clean_key(key), limits.shorten(value, limits.PARAM)))
                batch.cut = batch.cut or not limits.fits(key, value, limits.PARAM)
            for key, value in event.body.get("tags", {}).items():
                batch.tags[limits.clean_key(key)] = limits.shorten(value, limits.TAG)
                batch.cut = batch.cut or not limits.fits(key, value, limits.TAG)
        return batch

    def new_params(self, known: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """Params that the run does not have yet, and tags for those whose value changed (MLflow refuses a change)."""
        new: dict[str, str] = {}
        changed: dict[str, str] = {}
        for key, value in self.params:
            before = new.get(key, known.get(key))
            if before is None:
                new[key] = value
            elif before != value and not _same_cut(before, value):
                changed[limits.clean_key(CHANGED + key)] = value
        return new, changed


def _same_cut(there: str, value: str) -> bool:
    """Whether a server that allows less than ``PARAM`` holds the beginning of this very value."""
    return there == limits.shorten(value, limits.SMALLEST) or (
        len(there) >= limits.SMALLEST and value.startswith(there)
    )


def dataset_fields(body: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Fields of MLflow's ``Dataset`` and the context. A longer digest becomes a hash of it, whole in the profile."""
    digest, profile = str(body["digest"]), dict(body.get("profile", {}))
    if len(digest) > limits.DATASET_DIGEST:
        profile["digest"] = digest
        digest = hashlib.sha256(digest.encode()).hexdigest()[: limits.DATASET_DIGEST]
    fields = {
        "name": limits.shorten(str(body["name"]), limits.DATASET_NAME),
        "digest": digest,
        "source_type": "local" if "://" not in str(body["source"]) else str(body["source"]).partition("://")[0][:36],
        "source": json.dumps({"uri": str(body["source"])[: limits.DATASET_SOURCE - 100]}),
        "profile": json.dumps(profile, default=str),
    }
    return fields, str(body["context"])
