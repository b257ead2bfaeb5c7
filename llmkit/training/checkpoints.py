"""Checkpoints that are complete or invisible.

One is written into ``.checkpoint-N.partial``, with a manifest of its files and their sizes, flushed to the disk and
renamed to ``checkpoint-N``. Whatever a killed process leaves behind is either not named so or not complete, and is
passed over with a line that says so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llmkit.errors import UsageError
from llmkit.files import flush

MANIFEST = "llmkit_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Manifest:
    """``files`` holds sizes in bytes by path; ``data`` the fingerprint of the training sequences.

    ``engine`` says how weights and states are divided among the files: ``zero1`` to ``zero3``, ``fsdp``, empty for whole.
    """

    step: int
    world_size: int
    batch: int
    data: str
    files: dict[str, int] = field(default_factory=dict)
    engine: str = ""

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises OSError, ValueError or TypeError where there is no complete manifest."""
        return cls(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


def staging(folder: Path, step: int) -> Path:
    """An empty folder for the checkpoint of ``step``; leftovers of an earlier attempt are removed."""
    work = folder / f".checkpoint-{step}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def publish(work: Path, folder: Path, manifest: Manifest) -> Path:
    """Add the manifest, flush everything, and give the checkpoint its name."""
    files = {str(p.relative_to(work)): p.stat().st_size for p in sorted(work.rglob("*")) if p.is_file()}
    (work / MANIFEST).write_text(json.dumps(asdict(replace(manifest, files=files)), indent=1), encoding="utf-8")
    for path in work.rglob("*"):
        if path.is_file():
            flush(path)
    flush(work)
    target = folder / f"checkpoint-{manifest.step}"
    _remove(target)
    work.rename(target)
    flush(folder)
    return target


def problem(checkpoint: Path) -> str | None:
    """Why a folder is no complete checkpoint; None when it is one."""
    try:
        manifest = Manifest.read(checkpoint)
    except (OSError, ValueError, TypeError):
        return "it has no complete manifest"
    for name, size in manifest.files.items():
        try:
            found = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    return None


def newest_first(folder: Path) -> list[Path]:
    """Folders named like checkpoints, complete or not."""
    numbered = [(int(m.group(1)), p) for p in folder.glob("checkpoint-*") if (m := _NAME.search(p.name)) and p.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def last_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a line for each newer one that is not."""
    skipped: list[str] = []
    for path in newest_first(folder):
        why = problem(path)
        if why is None:
            return path, skipped
        skipped.append(f"{path.name} is not complete ({why}) and is passed over")
    return None, skipped


def check_fits(checkpoint: Path, run: Manifest) -> None:
    """Refuse a checkpoint of another data set, or of another division of the work among processes.

    Raises UsageError with the reason.
    """
    found = Manifest.read(checkpoint)
    if found.data != run.data:
        raise UsageError(
            f"{checkpoint} was trained on other data or another packing of it ({found.data}, now {run.data}): going on"
            " would neither repeat nor finish that run. Start anew with --resume never."
        )
    if found.engine != run.engine:
        raise UsageError(
            f"{checkpoint} was written {_by(found.engine)}, and this run trains {_by(run.engine)}: the states are divided"
            " in another way. Use the same deepspeed or fsdp setting, or start from its weights: llmkit export-weights."
        )
    if (found.world_size, found.batch) != (run.world_size, run.batch):
        raise UsageError(
            f"{checkpoint} was written by {found.world_size} process(es) with {found.batch} sequences a step; this run has"
            f" {run.world_size} process(es) with {run.batch}. The order of the data and the random state of each process"
            " would not be those of the interrupted run: use the same number, or start anew with --resume never."
        )


def _by(engine: str) -> str:
    return {"": "without sharding", "fsdp": "by FSDP2"}.get(engine) or f"by ZeRO stage {engine[-1]}"


def rotate(folder: Path, keep: int | None, best: Path | None) -> None:
    """Remove the oldest complete checkpoints beyond ``keep``; never the newest or the best."""
    for path in beyond([path for path in newest_first(folder) if problem(path) is None], keep, best):
        _remove(path)


def beyond(complete: Iterable[Path], keep: int | None, best: Path | None) -> list[Path]:
    """Which of the checkpoints are more than ``keep`` and not the best."""
    if keep is None:
        return []
    newest = sorted(complete, key=lambda path: _number(path), reverse=True)
    return [path for path in newest[max(keep, 1) :] if best is None or path.name != best.name]


def _number(path: Path) -> int:
    found = _NAME.search(path.name)
    return int(found.group(1)) if found else -1


def _remove(path: Path) -> None:
    """Take the name away first: a half-removed folder must not look like a checkpoint."""
    if path.exists():
        gone = path.with_name(f".{path.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
