"""``data:`` of a recipe becomes token stores: read, convert, render, tokenize, cache, report.

The cache has one folder for every combination of data, template, tokenizer, mask rule, settings and code. A file lock
lets one process do the work while the others wait for it; a second run maps the files and is done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from llmkit.context import Progress
from llmkit.data import report as reports
from llmkit.data.guard.examine import FILES as GUARD_FILES
from llmkit.data.guard.examine import examine
from llmkit.data.guard.findings import ROWS as GUARD_ROWS
from llmkit.data.guard.findings import summary_lines
from llmkit.data.guard.gate import Gate, cleaner, guard_identity
from llmkit.data.packing import best_fit, efficiency
from llmkit.data.pipeline import Drawer, chunks, content_hash, encode_chunk, new_report, open_source, refuse_empty
from llmkit.data.render import Renderer
from llmkit.data.report import SourceReport
from llmkit.data.rows import Encoded
from llmkit.data.settings import DataSettings, EvalSplitSettings
from llmkit.data.sources import Source, digest, eval_sources, train_sources
from llmkit.data.store import DamagedStoreError, TokenStore, TokenWriter
from llmkit.errors import DataError

REPORT = "data_report.json"
HISTOGRAM = "token_lengths.png"
_NOT_IN_KEY: Any = {
    **dict.fromkeys(("packing", "shuffle", "streaming", "cache_dir", "chat_template"), True),
    "guard": {"allow_licenses"},
}


@dataclass(frozen=True)
class Prepared:
    """Token stores, the report (as in ``data_report.json``) and the digest of every file that was read."""

    train: TokenStore
    eval: TokenStore | None
    report: dict[str, Any]
    digests: dict[str, str]


class Around(TypedDict):
    """What preparation takes from the run around it; ``is_main`` (True if not given) is whether this rank reports."""

    seed: int
    output_dir: Path
    progress: Progress
    is_main: NotRequired[bool]


def prepare(
    settings: DataSettings, renderer: Renderer, *, key: str = "data.train", **around: Unpack[Around]
) -> Prepared:
    """Tokenize the recipe's data once, or take it from the cache; the main rank writes the report and histogram.

    ``key`` is where the recipe has the rows that are in ``settings.train``. Adds to ``renderer.stop_ids`` what the rows'
    turns end with. Raises DataError for missing or unusable data, in one message; ``data_report.json`` then lists every
    row in question.
    """
    seed, output_dir, progress = around["seed"], around["output_dir"], around["progress"]
    is_main = around.get("is_main", True)
    digests = digest(settings, key)
    folder = Path(settings.cache_dir) / cache_key(settings, renderer, digests, seed, key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0.05)
    except Timeout:
        progress.note(f"another process is tokenizing into {folder}; waiting for it")
        lock.acquire()
    try:
        made = _from_cache(folder, progress)
        hit = made is not None
        if made is None:
            made = _build(settings, renderer, key, folder, seed, output_dir, progress, is_main)
    finally:
        lock.release()
    train, held_out, report = made
    for stop in report["stop_ids"]:
        if stop not in renderer.stop_ids:
            renderer.stop_ids += (stop,)
    report |= {"cache": {"hit": hit, "folder": str(folder)}, "digests": digests}
    report["packing"] = _packing(train, settings) if settings.packing else None
    if is_main:
        reports.write_json(output_dir / REPORT, report)
        shutil.copyfile(folder / HISTOGRAM, output_dir / HISTOGRAM)
        _copy_guard_files(folder, output_dir)
        _tell(report, progress, key)
    return Prepared(train, held_out, report, digests)


def prepare_eval(settings: DataSettings, renderer: Renderer, **around: Unpack[Around]) -> TokenStore | None:
    """The held-out rows alone, for streamed training; None without ``data.eval``. Raises DataError for a split."""
    if isinstance(settings.eval, EvalSplitSettings):
        raise DataError("data.eval: a split of the training rows needs them all; with streaming, name a source.")
    if settings.eval is None:
        return None
    guard = settings.guard.of_held_out() if settings.guard is not None else None
    alone = settings.model_copy(update={"train": settings.eval, "eval": None, "packing": False, "guard": guard})
    return prepare(alone, renderer, key="data.eval", **around).train


def cache_key(
    settings: DataSettings, renderer: Renderer, digests: dict[str, str], seed: int, key: str = "data.train"
) -> str:
    """Name of the cache folder: a digest of everything that decides about the tokens, and how the report calls them."""
    described = settings.model_dump(mode="json", exclude=_NOT_IN_KEY)
    # the template's text, the system message and the mask rule are in the renderer's fingerprint
    weights = [source.weight for source in train_sources(settings, key)]
    seeded = isinstance(settings.eval, EvalSplitSettings) or any(weight != int(weight) for weight in weights)
    whole: list[Any] = [described, digests, renderer.fingerprint, seed if seeded else None, key, _code_version()]
    if settings.guard is not None:
        whole.append(guard_identity(settings.guard))
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def _code_version() -> str:
    """Digest of the source of this package: tokens made by other code are made again."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("templates/*.jinja")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


Made = tuple[TokenStore, TokenStore | None, dict[str, Any]]


def _from_cache(folder: Path, progress: Progress) -> Made | None:
    """What an earlier run made, or None; a damaged cache is said and made again."""
    if not (folder / REPORT).is_file():
        return None
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        train = TokenStore(folder / "train.arrow")
        held_out = TokenStore(folder / "eval.arrow") if report["eval"] else None
        if not (folder / HISTOGRAM).is_file():
            raise DamagedStoreError(f"{folder / HISTOGRAM} is missing")
        fits = len(train) == report["train"]["rows"]
    except (DamagedStoreError, OSError, ValueError, KeyError, TypeError) as error:
        progress.note(f"the token cache is damaged and made again: {error}")
        return None
    if not fits:
        progress.note(f"the token cache {folder} does not fit its report and is made again")
        return None
    return train, held_out, report


class _Rows:
    """Encoded rows of the sources of one side, on disk, with content hash and times drawn."""

    def __init__(self, folder: Path, name: str) -> None:
        self.writer = TokenWriter(folder, name)
        self.hashes: list[int] = []
        self.counts: list[int] = []
        self.sources: list[SourceReport] = []


def _read_side(
    sources: list[Source],
    name: str,
    folder: Path,
    settings: DataSettings,
    renderer: Renderer,
    seed: int,
    progress: Progress,
    hashing: bool,
    gates: Sequence[Gate],
) -> _Rows:
    side = _Rows(folder, name)
    for index, (source, gate) in enumerate(zip(sources, gates, strict=True)):
        report = new_report(source)
        side.sources.append(report)
        rows, make = open_source(source, report)
        make = gate.around(make)
        if source.format == "auto":
            progress.note(f"{source.key}: format {report.format}, because {report.format_reason}")
        draw = Drawer(source.weight, seed, index)
        with progress.task(f"tokenizing {source.path}", None, "rows") as task:
            for read in chunks(rows):
                chunk, groups = gate.pass_on(read)
                report.rows_guarded += len(read) - len(chunk)
                counts = draw(len(chunk))
                drawn = [row for row, count in zip(chunk, counts, strict=True) if count]
                report.rows_read += len(read) - len(drawn)
                report.rows_not_drawn += len(chunk) - len(drawn)
                encoded = encode_chunk(drawn, make, renderer, settings, report)
                if groups is not None:
                    groups = [group for group, count in zip(groups, counts, strict=True) if count]
                _keep(side, encoded, [count for count in counts if count], hashing, groups)
                task.advance(len(read))
        refuse_empty(report)
    return side


def _keep(
    side: _Rows, encoded: list[list[Encoded]], counts: list[int], hashing: bool, groups: list[int] | None
) -> None:
    """``groups`` stand in for the hashes where duplicates, near ones too, are known."""
    flat = [piece for pieces in encoded for piece in pieces]
    side.writer.append(flat)
    for place, (pieces, count) in enumerate(zip(encoded, counts, strict=True)):
        if pieces:
            whole = groups[place] if groups is not None else _whole(pieces) if hashing else 0
            side.hashes += [whole] * len(pieces)
            side.counts += [count] * len(pieces)


def _whole(pieces: list[Encoded]) -> int:
    """Hash of a row; a split document counts as one."""
    if len(pieces) == 1:
        return content_hash(pieces[0])
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(piece.input_ids.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _build(
    settings: DataSettings,
    renderer: Renderer,
    key: str,
    folder: Path,
    seed: int,
    output_dir: Path,
    progress: Progress,
    is_main: bool,
) -> Made:
    """Tokenize into a fresh folder; its report, written last, marks it complete."""
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work"
    work.mkdir(parents=True)
    hashing = settings.eval is not None
    gates, guarded = _guard(settings, key, folder, output_dir, progress)
    sources = train_sources(settings, key)
    train = _read_side(sources, "train", work, settings, renderer, seed, progress, hashing, gates[0])
    held_out = _read_side(eval_sources(settings), "eval", work, settings, renderer, seed, progress, hashing, gates[1])
    report: dict[str, Any] = {
        "sources": [source.to_dict(settings.on_too_long) for source in train.sources + held_out.sources],
        "max_length": settings.max_length,
        "on_too_long": settings.on_too_long,
        "on_bad_row": settings.on_bad_row,
        "supervise": settings.supervise,
    }
    found = reports.problems(train.sources, settings)
    found += reports.problems(held_out.sources, settings) if held_out.sources else []
    if found:
        shutil.rmtree(folder, ignore_errors=True)
        if is_main:
            reports.write_json(output_dir / REPORT, report)
            found.append(f"Every such row is listed in {output_dir / REPORT}.")
        raise DataError("\n".join(found))
    stores = _write_stores(settings, train, held_out, seed, folder)
    report |= {
        "train": reports.store_summary(stores[0]),
        "eval": reports.store_summary(stores[1]) if stores[1] else None,
        "notes": [*renderer.notes, *summary_lines(guarded), *_notes(settings, train, held_out)],
        "eval_rows_also_in_train": len(_overlap(train, held_out)),
        "guard": guarded,
        "stop_ids": list(renderer.stop_ids),
    }
    held_out_lengths = stores[1].lengths if stores[1] else None
    reports.histogram(folder / HISTOGRAM, stores[0].lengths, held_out_lengths, settings.max_length)
    shutil.rmtree(work)
    reports.write_json(folder / REPORT, report)
    return stores[0], stores[1], report


def _guard(
    settings: DataSettings, key: str, folder: Path, output_dir: Path, progress: Progress
) -> tuple[tuple[list[Gate], list[Gate]], dict[str, Any] | None]:
    """A gate for each source of both sides, and the guard's report. Raises DataError for what the recipe forbids."""
    held_out = eval_sources(settings)
    if settings.guard is None:
        return ([Gate() for _ in train_sources(settings, key)], [Gate() for _ in held_out]), None
    verdict = examine(settings, settings.guard, folder / "work" / "guard", folder, progress, key)
    shutil.rmtree(folder / "work" / "guard")
    if verdict.problems:
        _copy_guard_files(folder, output_dir)
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError("\n".join([*verdict.problems, f"Every such row is listed in {output_dir / GUARD_ROWS}."]))
    clean = cleaner(settings.guard)
    split = isinstance(settings.eval, EvalSplitSettings)
    train = [Gate(source, clean, grouped=split) for source in verdict.train]
    return (train, [Gate(source, clean) for source in verdict.eval]), verdict.report


def _copy_guard_files(folder: Path, output_dir: Path) -> None:
    for name in GUARD_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output_dir / name)


def _write_stores(
    settings: DataSettings, train: _Rows, held_out: _Rows, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore | None]:
    counts = np.array(train.counts, dtype=np.int64)
    rows = np.arange(len(counts), dtype=np.int64)
    aside = np.empty(0, np.int64)
    if isinstance(settings.eval, EvalSplitSettings):
        aside = hold_out(np.array(train.hashes, dtype=np.uint64), settings.eval.split, seed)
        rows = np.setdiff1d(rows, aside)
    plain = not len(aside) and bool(np.all(counts == 1))
    if len(aside):
        train.writer.finish(folder / "eval.arrow", aside)
    train.writer.finish(folder / "train.arrow", None if plain else np.repeat(rows, counts[rows]))
    if held_out.sources:
        weights = np.array(held_out.counts, dtype=np.int64)
        held_out.writer.finish(folder / "eval.arrow", np.repeat(np.arange(len(weights)), weights))
    has_eval = len(aside) > 0 or bool(held_out.sources)
    return TokenStore(folder / "train.arrow"), TokenStore(folder / "eval.arrow") if has_eval else None


def hold_out(hashes: NDArray[np.uint64], share: float, seed: int) -> NDArray[np.int64]:
    """Row numbers of a seeded share of the rows, at least one; rows of equal hash are on one side.

    Raises DataError when all rows are the same.
    """
    unique, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        raise DataError("data.eval: split needs at least two different rows to hold one out.")
    order = np.random.default_rng([seed & 0xFFFFFFFF, 0xE7A1]).permutation(len(unique))
    reached = np.cumsum(counts[order])
    taken = int(np.searchsorted(reached, max(1, round(share * len(hashes))), side="left")) + 1
    chosen = np.zeros(len(unique), dtype=bool)
    chosen[order[: min(taken, len(unique) - 1)]] = True
    return np.flatnonzero(chosen[inverse]).astype(np.int64)


def _overlap(train: _Rows, held_out: _Rows) -> list[str]:
    """Ids of held-out rows whose tokens are a training row's too."""
    seen = set(train.hashes) if held_out.sources else set()
    return [row_id for row_id, hashed in zip(held_out.writer.row_ids, held_out.hashes, strict=True) if hashed in seen]


def _notes(settings: DataSettings, train: _Rows, held_out: _Rows) -> list[str]:
    notes = []
    for source in train.sources + held_out.sources:
        if source.bad:
            notes.append(f"{source.key}: left out {len(source.bad):,} bad rows of {source.rows_read:,}")
        if source.too_long and settings.on_too_long == "drop":
            notes.append(
                f"{source.key}: left out {len(source.too_long):,} rows longer than {settings.max_length} tokens"
            )
        if source.too_long and settings.on_too_long == "truncate":
            notes.append(
                f"{source.key}: cut {len(source.too_long):,} rows at {settings.max_length} tokens; "
                "they lost the end of the answer and its stop token"
            )
        if source.documents_split:
            notes.append(f"{source.key}: split {source.documents_split:,} documents longer than {settings.max_length}")
        if source.drifted:
            notes.append(
                f"{source.key}: in {source.drifted:,} rows (first {source.first_drifted}) the tokens where an earlier "
                "assistant turn starts differ from encoding the whole conversation at once; llmkit's own inference "
                "uses the tokens of training, another engine may not"
            )
    overlap = _overlap(train, held_out)
    if overlap:
        notes.append(
            f"warning: {len(overlap):,} held-out rows are training rows too (first: {', '.join(overlap[:3])}); "
            "the held-out loss will look better than it is"
        )
    return notes


def _packing(train: TokenStore, settings: DataSettings) -> dict[str, float]:
    """How well the rows fill packed sequences."""
    bins = len(best_fit(train.lengths, settings.max_length))
    return {
        "sequences": bins,
        "efficiency": efficiency(train.lengths, bins, settings.max_length),
        "rows_per_sequence": len(train) / bins,
    }


def _tell(report: dict[str, Any], progress: Progress, key: str) -> None:
    for note in report["notes"]:
        progress.note(note)
    for side, name in (("train", key.removeprefix("data.")), ("eval", "eval")):
        if report[side]:
            found = report[side]
            progress.note(
                f"{name}: {found['rows']:,} rows, {found['tokens']:,} tokens, {found['supervised_tokens']:,} supervised"
                + (" (from the token cache)" if report["cache"]["hit"] else "")
            )
