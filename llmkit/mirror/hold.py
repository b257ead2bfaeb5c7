"""Who works in a run folder of an object store: one process at a time, as far as a store can tell.

The claim is an object, ``.lease.json``: its owner writes it anew every few seconds. Nobody compares clocks: whoever finds a claim
watches it, and takes it over when it has not changed for ``LAPSE_S``, or at once where the owner was a process of
this machine that is gone. It is made with ``If-None-Match`` and taken over with ``If-Match`` where the store knows
these (AWS S3, SeaweedFS, MinIO and others do); elsewhere the last to write wins, and the other finds out before it
writes anything that counts: every marker and result is written only after a look at the claim.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from llmkit.errors import StoreError, UsageError
from llmkit.mirror.store import Store

LEASE = ".lease.json"
BEAT_S = 8.0
LAPSE_S = 45.0
_LOOK_S = 1.0
_SETTLE_S = 1.0
"""Two that write at once to a store without conditions both look again after this."""

_ours: set[str] = set()
"""Claims that this very process holds."""


@dataclass(frozen=True)
class Claim:
    """``beat`` counts up while the owner lives; ``released`` says that it left in peace."""

    owner: str
    host: str
    boot: str
    pid: int
    beat: int = 0
    released: bool = False

    @classmethod
    def ours(cls, owner: str, *, beat: int = 0, released: bool = False) -> Claim:
        return cls(owner, socket.gethostname(), _boot(), os.getpid(), beat, released)

    @classmethod
    def read(cls, store: Store) -> Claim | None:
        """None where there is none (or one that cannot be read)."""
        data = store.read(LEASE)
        try:
            return cls(**json.loads(data)) if data else None
        except (ValueError, TypeError):
            return None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def over(self) -> bool:
        """Whether its owner surely writes no more."""
        return self.released or (
            (self.host, self.boot) == (socket.gethostname(), _boot())
            and self.owner not in _ours
            and not _lives(self.pid)
        )

    @property
    def who(self) -> str:
        return f"process {self.pid} on {self.host}"


def new_owner() -> str:
    return uuid.uuid4().hex


class Hold:
    """A claim that this process holds, and a thread that renews it. ``on_lost`` is called, once, with the reason."""

    def __init__(self, store: Store, owner: str, on_lost: Callable[[str], None]) -> None:
        self._store, self._owner, self._on_lost = Store(store.uri, patience_s=0), owner, on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="llmkit-lease", daemon=True)
        _ours.add(owner)
        self._thread.start()

    def release(self) -> None:
        """Give the folder free; a store that is away finds the claim lapsed later."""
        self._ended.set()
        self._thread.join(BEAT_S)
        _ours.discard(self._owner)
        try:
            found = Claim.read(self._store)
            if found is not None and found.owner == self._owner:
                self._store.write(LEASE, Claim.ours(self._owner, released=True).to_bytes())
        except StoreError:
            return

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_S):
            beat += 1
            try:
                found = Claim.read(self._store)
                if found is not None and found.owner != self._owner:
                    self._on_lost(taken_over(self._store.uri, found))
                    return
                self._store.write(LEASE, Claim.ours(self._owner, beat=beat).to_bytes())
            except StoreError:
                continue  # while it is away nobody else can take the folder either


def taken_over(uri: str, other: Claim) -> str:
    return f"{uri} was taken over by another llmkit process ({other.who}): this one writes nothing more into it."


def acquire(store: Store, owner: str) -> Claim | None:
    """Make the folder ``owner``'s, and give back the claim that was there before. ``UsageError`` where somebody works in it."""
    store.check()
    while True:
        version = store.version(LEASE)
        before = Claim.read(store)
        if before is not None and before.owner != owner and not before.over:
            _watch(store, before)
        if _write(store, Claim.ours(owner), before, version) and _is_ours(store, owner):
            return before


def _write(store: Store, claim: Claim, before: Claim | None, version: str | None) -> bool:
    if before is None and version is None:
        return store.create(LEASE, claim.to_bytes())
    return store.replace(LEASE, claim.to_bytes(), version)


def _is_ours(store: Store, owner: str) -> bool:
    """Whether the claim stays ours: a store that ignores the condition lets a second one write as well."""
    if store.version(LEASE) is None:
        time.sleep(_SETTLE_S)
    found = Claim.read(store)
    return found is not None and found.owner == owner


def _watch(store: Store, claim: Claim) -> None:
    """Returns when the claim has lapsed or was released; ``UsageError`` as soon as its owner shows itself."""
    end = time.monotonic() + LAPSE_S
    while time.monotonic() < end:
        time.sleep(_LOOK_S)
        found = Claim.read(store)
        if found is None or found.over:
            return
        if found != claim:
            raise UsageError(
                f"Another llmkit process ({found.who}) is working in {store.uri}. "
                "Wait for it, stop it, or give another --output-dir."
            )


def _lives(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier run of this very process that could not release it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    """Which start of which kernel this is: containers on one machine share it, and have host names of their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
