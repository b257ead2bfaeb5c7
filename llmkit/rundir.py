"""The folder of a run: whose it is, what state it is in, and how it is claimed and written.

Files the runner owns: ``recipe.yaml`` (the frozen, resolved recipe), ``run.json`` (stage, version, digests of recipe
and data), ``result.json`` (written last), ``.lock`` (held while a run works; the kernel releases it when the process
dies). A stage owns the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmkit import ranks
from llmkit.context import Result
from llmkit.errors import RecipeError, UsageError
from llmkit.files import flush
from llmkit.recipe import Recipe, diff, dump, load_recipe

RECIPE, RUN, RESULT, LOCK = "recipe.yaml", "run.json", "result.json", ".lock"

NO_WORK = frozenset({
    RECIPE, RUN, RESULT, LOCK, "traceback.txt", "log.jsonl", "data_report.json", "token_lengths.png",
    "tracking.json", "before.json", "job.json", "deepspeed.json", "batch_size.json", "logs", "guard_report.json",
    "guard_rows.jsonl", "guard_lengths.png", "perplexity.png",
})  # fmt: skip
"""What a run leaves behind that failed before it had trained anything; losing it loses no work."""

WITHOUT_EFFECT = (
    "tracking", "launch", "output_dir", "name", "data.cache_dir", "train.logging_steps", "train.save_minutes",
    "train.save_total_limit", "train.time_limit_minutes", "plan", "max_errors", "budget",
)  # fmt: skip
"""Keys that may change between two starts of one run: they do not change what comes out."""

State = Literal["new", "continue", "done", "set_aside", "unseen"]
"""``unseen`` is a folder in an object store that was not asked yet."""


@dataclass(frozen=True)
class Finding:
    """What ``examine`` saw: ``why`` is for the user; ``result`` is the old one of a finished run."""

    state: State
    why: str = ""
    result: Result | None = None


@dataclass(frozen=True)
class RunFile:
    """``run.json``: what the frozen recipe itself does not say."""

    stage: str
    version: str
    recipe_digest: str
    data: Mapping[str, str]
    started_at: str
    cwd: str

    @classmethod
    def read(cls, folder: Path) -> RunFile | None:
        """None where there is none; ``UsageError`` where it is damaged."""
        path = folder / RUN
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as exc:
            raise UsageError(f"{path} is damaged ({exc}). {_fixes()}") from exc


def text_digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def examine(folder: Path, stage: str, recipe: Recipe, resume: str, data: Mapping[str, str] | None) -> Finding:
    """What starting ``recipe`` in ``folder`` would mean. Reads only.

    ``data`` holds the digests of the inputs now, None leaves them unchecked. ``UsageError`` where the folder is not
    a run's, is another run's, or is this run's with other data.
    """
    entries = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    entries = {e for e in entries if not e.startswith(".")}
    if not entries:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"The output folder {folder} is a file. Give another --output-dir.")
        return Finding("new")
    if not entries & {RECIPE, RUN}:
        raise UsageError(
            f"The output folder {folder} holds files that are not of an llmkit run "
            f"({', '.join(sorted(entries)[:3])}{', …' if len(entries) > 3 else ''}). Give another --output-dir."
        )
    if resume == "never":
        return Finding("set_aside", "--resume never")
    has_work = bool(entries - NO_WORK) and _not_empty(folder, entries - NO_WORK)
    old = RunFile.read(folder) if RUN in entries else None
    if old is None or RECIPE not in entries:
        if has_work:
            raise UsageError(f"{folder} lacks its {RECIPE if RECIPE not in entries else RUN}. {_fixes()}")
        return Finding("new")
    return _compare(folder, stage, recipe, resume, data, old, has_work)


def _compare(
    folder: Path, stage: str, recipe: Recipe, resume: str, data: Mapping[str, str] | None, old: RunFile, has_work: bool
) -> Finding:
    result = read_result(folder)
    done = result is not None and result.status == "done"
    why = _difference(folder, stage, recipe, old)
    starts_over = recipe.starts_over and old.stage == stage
    if why:
        if starts_over:
            return Finding("set_aside", f"it was of another recipe ({why})")
        if has_work or done:
            raise UsageError(f"{folder} holds a run of another recipe: {why}. {_fixes()}")
        return Finding("set_aside", f"it was of another recipe ({why}) and had not trained anything")
    changed = _changed(old.data, data)
    if changed and starts_over:
        return Finding("set_aside", f"changed since: {', '.join(changed)}")
    if changed and (has_work or done):
        raise UsageError(f"The data changed since the run in {folder} began: {', '.join(changed)}. {_fixes()}")
    if done and result is not None:
        if resume not in ("auto", "never"):
            raise UsageError(f"The run in {folder} is finished. To go on from {resume}, give another --output-dir.")
        return Finding("done", f"finished on {result.finished_at or 'an unknown date'}, nothing to do", result)
    return Finding("continue")


def _difference(folder: Path, stage: str, recipe: Recipe, old: RunFile) -> str:
    """How the folder's recipe departs from ``recipe`` in what matters; ``""`` for not at all."""
    if old.stage != stage:
        return f"its stage is {old.stage}, not {stage}"
    path = folder / RECIPE
    if text_digest(path.read_text(encoding="utf-8")) != old.recipe_digest:
        return f"{path} was edited after the run began"
    try:
        frozen = load_recipe(path, type(recipe))
    except RecipeError as exc:
        return f"written by llmkit {old.version}, this version cannot read it: {exc.problems[0]}"
    keys = [k for k in diff(frozen, recipe) if not without_effect(k)]
    return f"{', '.join(keys)} differ{'s' if len(keys) == 1 else ''}" if keys else ""


def without_effect(key: str) -> bool:
    return any(key == k or key.startswith(k + ".") for k in WITHOUT_EFFECT)


def _changed(old: Mapping[str, str], new: Mapping[str, str] | None) -> list[str]:
    if new is None:
        return []
    return sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))


def _not_empty(folder: Path, entries: set[str]) -> bool:
    paths = [folder / e for e in entries]
    return any(not p.is_dir() or any(not c.name.startswith(".") for c in p.iterdir()) for p in paths)


def read_result(folder: Path) -> Result | None:
    """The run's result, None where it has not ended (or the file cannot be read)."""
    try:
        return Result.from_json((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def tracked_run(folder: Path) -> str | None:
    """The id of the run's MLflow run, None where it has none (yet)."""
    try:
        found: str | None = json.loads((folder / "tracking.json").read_text(encoding="utf-8")).get("run_id")
    except (OSError, ValueError, AttributeError):
        return None
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint by its number, complete or not; the stage decides which it takes."""
    found = [p for p in (folder / "checkpoints").glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def set_aside(folder: Path) -> Path:
    """Rename the folder to the first free ``<folder>.1``, ``.2``, …; nothing is lost."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def freeze(folder: Path, stage: str, recipe: Recipe, data: Mapping[str, str], version: str, now: str) -> None:
    """Write ``recipe.yaml`` and ``run.json``; an old result is taken away, because the run begins again."""
    (folder / RESULT).unlink(missing_ok=True)
    text = dump(recipe)
    before = RunFile.read(folder)
    file = RunFile(stage, version, text_digest(text), data, before.started_at if before else now, str(Path.cwd()))
    write_atomic(folder / RECIPE, text)
    write_atomic(folder / RUN, json.dumps(file.__dict__ | {"data": dict(data)}, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Hold the folder's lock, making the folder first, and give its file descriptor.

    None where this process's launcher holds it already, ``UsageError`` where any other process does.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # set aside by another process just now
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.seek(0)
            holder: dict[str, Any] = _holder(file.read())
            file.close()
            launcher = ranks.launcher()
            if launcher is not None and holder.get("pid") == launcher.pid:
                break
            raise UsageError(
                f"Another llmkit process{_who(holder)} is working in {folder}. "
                "Wait for it, stop it, or give another --output-dir."
            ) from exc
        if _same_file(file.fileno(), path):
            break
        file.close()
    if file.closed:
        yield None
        return
    try:
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        file.flush()
        yield file.fileno()
    finally:
        file.close()


def _holder(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _who(holder: Mapping[str, Any]) -> str:
    return f" ({holder['pid']} on {holder['host']})" if {"pid", "host"} <= holder.keys() else ""


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at ``path``: the folder may have been renamed in between."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _fixes() -> str:
    return "Give another --output-dir, or --resume never (the old folder is kept under another name)."
