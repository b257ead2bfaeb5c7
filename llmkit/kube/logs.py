"""What a job's pods write, read piece by piece from the API server."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from llmkit.errors import LlmkitError, MissingError
from llmkit.kube import api
from llmkit.launch.record import Record

_OVERLAP_S = 30
"""Seconds that are read again: clocks differ, and lines arrive late. Lines are told apart by their time stamps."""
POLL_S = 1.0


class Log:
    """``more`` gives the lines that were written since the last call; those of several pods begin with the pod's role."""

    def __init__(self, kind: api.Kind, record: Record) -> None:
        self._kind, self._record = kind, record
        self._cluster = api.cluster_of_record(record)
        self._last: dict[str, str] = {}
        self._read_at: dict[str, float] = {}

    def more(self) -> str:
        """A server that does not answer now, or a pod that has not begun, has nothing to say yet."""
        try:
            pods = api.pods_of(self._kind, self._cluster, self._record)
            return "".join(self._of(pod, len(pods) > 1) for pod in pods)
        except MissingError:
            return ""

    def rest(self) -> str:
        return self.more()

    def _of(self, pod: Any, several: bool) -> str:
        states = pod.status.container_statuses or []
        if not any(c.state and (c.state.running or c.state.terminated) for c in states):
            return ""
        role = f"[{pod.metadata.name.removeprefix(self._record.id + '-')}] " if several else ""
        return "".join(f"{role}{line}\n" for line in self._lines(pod.metadata.uid, pod.metadata.name))

    def _lines(self, uid: str, name: str) -> Iterator[str]:
        began = time.monotonic()
        since = math.ceil(began - self._read_at[uid]) + _OVERLAP_S if uid in self._read_at else None
        read = self._cluster.core.read_namespaced_pod_log
        try:
            answer = self._cluster.call(
                f"reading the log of {name}", read, name, self._cluster.namespace, timestamps=True, since_seconds=since,
                _preload_content=False,
            )  # fmt: skip
        except LlmkitError as error:
            if getattr(error.__cause__, "status", None) in (400, 404):  # the pod is being made, or is gone
                return
            raise
        self._read_at[uid] = began
        for line in answer.data.decode(errors="replace").splitlines():
            stamp, _, text = line.partition(" ")
            if (when := _sortable(stamp)) > self._last.get(uid, ""):
                self._last[uid] = when
                yield text


def _sortable(stamp: str) -> str:
    """A time stamp with all its nine digits: the kubelet leaves zeros at the end out."""
    seconds, _, fraction = stamp.removesuffix("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def follow(kind: api.Kind, record: Record, on: bool) -> Iterator[str]:
    """What the job has written; with ``on``, as it comes, until the job ends."""
    log = Log(kind, record)
    while True:
        final = not on or api.status(kind, record).final
        yield log.rest() if final else log.more()
        if final:
            return
        time.sleep(POLL_S)
