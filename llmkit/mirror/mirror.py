"""Keep a run's scratch folder and its folder in the store alike: pull at the start, upload what is complete, result last."""

from __future__ import annotations

import fcntl
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llmkit import ranks
from llmkit.errors import LlmkitError, StoppedEarly, StoreError, UsageError
from llmkit.mirror.hold import LEASE, Claim, Hold, acquire, new_owner, taken_over
from llmkit.mirror.journal import Journal
from llmkit.mirror.pull import LOCK, RESULT, clear, fetch, pull
from llmkit.mirror.store import Store
from llmkit.mirror.units import Contents, File, Marker, loose, marker_of, part_of
from llmkit.mirror.uploads import OUTBOX, Order, Uploads, error_of
from llmkit.ranks import Nodes
from llmkit.training import checkpoints

TRACKING, RECIPE, RUN = "tracking.json", "recipe.yaml", "run.json"
HURRY_S = 5.0
"""What uploads get after a second Ctrl-C."""
_POLL_S = 1.0

Note = Callable[[str], None]


class Mirror:
    """Made by ``held`` or ``followed``; the stage sees it as ``context.Outbox``."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        journal: Journal,
        contents: Contents,
        note: Note,
        nodes: Nodes,
        patience_s: float,
    ) -> None:
        self.uri, self.folder, self.session = store.uri, folder, journal.sessions[-1]
        self._store, self._journal, self._nodes, self._patience_s = store, journal, nodes, patience_s
        self._note = note
        self._units = dict(contents.units)
        self._busy = threading.RLock()
        self._uploads = Uploads(folder, self._carry_out, note, patience_s)
        self._expected = set(self._units)

    # What a stage calls

    def publish(self, path: Path, *, divided: bool = False) -> None:
        """Have a finished file or folder of the run uploaded; ``divided`` where every machine has a part of it."""
        unit = self._name(path)
        self._expected.add(unit)
        self._uploads.publish(path, unit, divided=divided)

    def publish_part(self, path: Path, unit: Path) -> None:
        """The files of this machine for a unit that the first machine completes."""
        self._uploads.publish(path, self._name(unit), divided=True)

    def retire(self, path: Path) -> None:
        unit = self._name(path)
        self._expected.discard(unit)
        self._uploads.retire(unit)

    def published(self, folder: Path) -> list[Path]:
        """What is in the store below ``folder``, or will be."""
        within = self._name(folder) + "/"
        return [self.folder / unit for unit in sorted(self._expected) if unit.startswith(within)]

    def fetch(self, path: Path) -> None:
        """Have a unit of the store on this machine, which may have to wait until it is complete there."""
        unit = self._name(path)
        end = time.monotonic() + self._patience_s
        while (data := self._store.read(marker_of(unit))) is None:
            if time.monotonic() > end:
                raise StoreError(f"{self.uri} has no complete {unit}.", passing=True)
            time.sleep(_POLL_S)
        with self._busy:
            fetch(self._store, self.folder, Marker.parse(data), self._journal)

    # What the runner calls

    def begin(self, *, done: bool) -> None:
        """The run begins, or goes on: what it is, is in the store before it works; an old result is not.

        What an earlier start of it could not upload is uploaded now.
        """
        if not done:
            self._check_hold()
            self._store.delete([RESULT])
            self._journal.sent.pop(RESULT, None)
            self.push()
        for path in checkpoints.newest_first(self.folder / "checkpoints"):
            if self._name(path) not in self._units and checkpoints.problem(path) is None:
                self.publish(path)

    def push(self, *names: str) -> None:
        """Upload the small files right below the folder that changed, or those of them; all but the result."""
        with self._busy:
            if names:
                for name in names:
                    self._push_one(self.folder / name)
                self._journal.save()
                return
            tracking = self.folder / TRACKING
            # Read before the log that it counts in, and written after it: it never counts more than is there.
            counted = tracking.read_bytes() if tracking.is_file() else None
            for path in sorted(self.folder.iterdir()):
                if (
                    path.is_file()
                    and loose(path.name)
                    and path.name not in (RESULT, TRACKING)
                    and not _unfinished(path)
                ):
                    self._push_one(path)
            if counted is not None:
                self._store.write(TRACKING, counted)
            self._journal.save()

    def set_aside(self) -> str:
        """Move everything in the store to the first free ``<uri>.1``, ``.2``, …; a move that is cut off leaves it whole here."""
        number = 1
        while (target := self._store.beside(f".{number}")).sizes():
            number += 1
        names = [name for name in self._store.sizes() if name != LEASE]
        markers = [name for name in names if name.startswith(".")]
        for name in [*(n for n in names if n not in markers), *markers]:
            self._store.copy(name, target)
        self._store.delete([*markers, *(n for n in names if n not in markers)])
        self._units.clear()
        self._expected.clear()
        clear(self.folder, self._journal, self._note)
        self._journal.save()
        return target.uri

    def finish(self, patience_s: float | None = None) -> None:
        """Everything is in the store when this returns, ``result.json`` last. Raises StoreError with what is not."""
        left = self._uploads.close(patience_s)
        trouble = error_of(self._uploads.trouble)
        if isinstance(trouble, LlmkitError) and not isinstance(trouble, StoreError):
            raise trouble
        if trouble is None and self._nodes.number == 0:
            store = self._store
            store.patience_s = self._patience_s if patience_s is None else patience_s
            try:
                self._finish_rest()
            except StoreError as exc:
                trouble = exc
        if trouble is not None:
            left += [unit for unit, _ in self._rest() if unit not in self._units] + self._stale()
            raise StoreError(
                f"{trouble}\nNot in {self.uri} yet: {', '.join(left) or 'the last small files'}. All of it is in {self.folder} on"
                f" {socket.gethostname()}: the same command on this machine uploads it."
            )

    # Uploading

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.folder).as_posix()

    def _carry_out(self, order: Order) -> None:
        if order.staged is None:
            self._remove(order.unit)
        elif self._nodes.number:
            files = _files(order.staged)
            self._upload_files(order.staged, order.unit, files)
            part = part_of(f"{self.session}/{order.unit}", self._nodes.number)
            self._store.write(part, Marker(order.unit, files).to_bytes())
        else:
            self._upload(order.unit, order.staged, divided=order.divided)

    def _upload(self, unit: str, staged: Path, *, divided: bool) -> None:
        files = _files(staged)
        before = self._units.get(unit)
        if before is not None and before.files == files and self._nodes.count == 1:
            return
        if before is not None:
            self._forget(unit)
        self._upload_files(staged, unit, files)
        if divided:
            files |= self._parts(unit)
        self.push()
        self._check_hold()
        marker = Marker(unit, files)
        self._store.write(marker_of(unit), marker.to_bytes())
        self._units[unit] = marker
        self._store.delete(part_of(f"{self.session}/{unit}", node) for node in range(1, self._nodes.count) if divided)

    def _upload_files(self, staged: Path, unit: str, files: Mapping[str, File]) -> None:
        """Each file that the store has not got from this folder already."""
        there = self._store.sizes(unit)
        for name, file in files.items():
            with self._busy:
                known = self._journal.has(name, file)
            if not (known and there.get(name) == file.size):
                self._store.upload(staged / name, name)
                with self._busy:
                    self._journal.note(name, file)
                    self._journal.save()

    def _parts(self, unit: str) -> dict[str, File]:
        """The files of the other machines; StoreError as long as one is missing."""
        names = [part_of(f"{self.session}/{unit}", node) for node in range(1, self._nodes.count)]
        end = time.monotonic() + self._patience_s
        while len(found := self._store.read_many(names)) < len(names) and time.monotonic() < end:
            time.sleep(_POLL_S)
        if missing := [name for name in names if name not in found]:
            raise StoreError(
                f"{unit}: another machine has not uploaded its part yet ({', '.join(missing)}).", passing=True
            )
        return {name: file for data in found.values() for name, file in Marker.parse(data).files.items()}

    def _remove(self, unit: str) -> None:
        marker = self._units.get(unit)
        self._forget(unit)
        names = set(self._store.sizes(unit)) | set(marker.files if marker else ())
        self._store.delete(sorted(names))
        with self._busy:
            for name in names:
                self._journal.sent.pop(name, None)
            self._journal.save()

    def _forget(self, unit: str) -> None:
        """The marker first: what is half removed is not complete."""
        self._check_hold()
        self._store.delete([marker_of(unit)])
        self._units.pop(unit, None)

    def _push_one(self, path: Path) -> None:
        if self._journal.unchanged(path.name, path):
            return
        changed = path.stat().st_mtime_ns
        file = File.of(path)
        if not self._journal.has(path.name, file):
            self._store.upload(path, path.name)
        self._journal.note(path.name, file, changed)

    def _check_hold(self) -> None:
        """UsageError where the folder is no longer this run's."""
        found = Claim.read(self._store)
        if found is not None and found.owner != self.session:
            raise UsageError(taken_over(self.uri, found))

    # The end

    def _finish_rest(self) -> None:
        # A process that this one started may have uploaded meanwhile.
        self._journal.sent = Journal.load(self.folder, self.uri).sent
        self._units = dict(Contents.of(self._store).units)
        for unit, paths in self._rest():
            files = self._journaled(paths)
            before = self._units.get(unit)
            if before is None or before.files != files:
                if before is not None:
                    self._forget(unit)
                for path in paths:
                    self._send(path)
                self._check_hold()
                self._store.write(marker_of(unit), Marker(unit, files).to_bytes())
                self._units[unit] = Marker(unit, files)
        self.push()
        result = self.folder / RESULT
        if result.is_file() and not self._journal.unchanged(RESULT, result):
            self._check_hold()
            self._push_one(result)
        self._journal.save()

    def _rest(self) -> list[tuple[str, list[Path]]]:
        """The folders of the run, and what of them is not part of a unit that was published by itself."""
        published = {name for unit, marker in self._units.items() if "/" in unit for name in marker.files}
        found = []
        for folder in sorted(self.folder.iterdir()):
            if folder.is_dir() and folder.name != "checkpoints" and not _unfinished(folder):
                paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _hidden(p, folder)]
                if paths := [p for p in paths if self._name(p) not in published]:
                    found.append((folder.name, paths))
        return found

    def _journaled(self, paths: list[Path]) -> dict[str, File]:
        return {self._name(path): File.of(path) for path in paths}

    def _send(self, path: Path) -> None:
        name, file = self._name(path), File.of(path)
        if not self._journal.has(name, file):
            self._store.upload(path, name)
            self._journal.note(name, file)
            self._journal.save()

    def _stale(self) -> list[str]:
        """The small files that changed since they were sent."""
        paths = [p for p in sorted(self.folder.iterdir()) if p.is_file() and loose(p.name)]
        return [p.name for p in paths if not self._journal.unchanged(p.name, p) and p.name != TRACKING]


def _files(staged: Path) -> dict[str, File]:
    return {p.relative_to(staged).as_posix(): File.of(p) for p in sorted(staged.rglob("*")) if p.is_file()}


def _unfinished(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix in (".unchecked", ".partial", ".tmp")


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


# Opening


@contextmanager
def held(uri: str, folder: Path, note: Note, on_lost: Note, nodes: Nodes, patience_s: float) -> Iterator[Mirror]:
    """Claim the folder in the store, pull what ``folder`` lacks, and bring the store up to date at the end.

    The folder's lock must be held. Raises UsageError where another process works there, StoreError where the store is
    away, refuses, or did not take everything.
    """
    store = Store(uri)
    journal = Journal.load(folder, store.uri)
    if ranks.launcher() is not None and journal.sessions:  # the process that started this one claimed it, and pulled
        yield from _closing(Mirror(store, folder, journal, Contents.of(store), note, nodes, patience_s))
        return
    owner = new_owner()
    sessions = journal.sessions
    journal.sessions = [*sessions[-1:], owner]
    journal.save()
    before = acquire(store, owner)
    hold = Hold(store, owner, on_lost)
    try:
        if before is None:  # the folder in the store is new, or was removed
            journal.sent.clear()
        here_is_newest = before is not None and before.owner in sessions and nodes.count == 1
        contents = Contents.of(store) if here_is_newest else pull(store, folder, journal, note)
        shutil.rmtree(folder / OUTBOX, ignore_errors=True)
        journal.sessions = [owner]
        journal.save()
        yield from _closing(Mirror(store, folder, journal, contents, note, nodes, patience_s))
    finally:
        hold.release()


def _closing(mirror: Mirror) -> Iterator[Mirror]:
    try:
        yield mirror
    except StoppedEarly:
        mirror.finish()  # what was not uploaded is what the user must hear: the run would go on from less elsewhere
        raise
    except BaseException as exc:
        try:
            mirror.finish(HURRY_S if isinstance(exc, KeyboardInterrupt) else None)
        except LlmkitError as second:
            print(second, file=sys.stderr, flush=True)
        raise
    mirror.finish()


@contextmanager
def followed(
    uri: str, folder: Path, session: str, note: Note, nodes: Nodes, patience_s: float
) -> Iterator[Mirror | None]:
    """The same for a process on another machine than rank 0's: pull what rank 0 found, upload this machine's parts.

    The first process of a machine pulls, the others wait for it; only the first gets a mirror.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(uri)
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        journal = Journal.load(folder, store.uri)
        if journal.sessions != [session]:
            pull(store, folder, journal, note)
            shutil.rmtree(folder / OUTBOX, ignore_errors=True)
            journal.sessions = [session]
            journal.save()
    if nodes.local_rank:
        yield None
        return
    yield from _closing(Mirror(store, folder, journal, Contents.of(store), note, nodes, patience_s))
