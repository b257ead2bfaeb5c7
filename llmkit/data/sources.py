"""Where rows come from: the sources that a recipe names, the files behind them, their digests, their rows.

Light: the standard library only; pyarrow, fsspec and datasets are imported when a source needs them.
Plain ``.txt`` and ``.md`` files are one document each.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.data.readers import READERS, Rows, filesystem, is_uri, read_file, suffix_of
from llmkit.data.rows import RawRow
from llmkit.data.settings import DataSettings, EvalSplitSettings, Format, Sources, SourceSettings
from llmkit.errors import DataError, MissingError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One source with everything decided. ``key`` is where the recipe names it, e.g. ``data.train[1]``."""

    key: str
    path: str
    weight: float
    split: str
    format: Format
    columns: dict[str, str]

    @property
    def is_hub(self) -> bool:
        """A string of the shape ``org/name`` that is no path on this machine and does not look like a file."""
        return (
            _HUB_ID.fullmatch(self.path) is not None
            and not suffix_of(self.path)
            and not Path(self.path).exists()
            and not Path(self.path.split("/")[0]).is_dir()
        )

    def files(self) -> list[str]:
        """The files of this source, sorted; ``[]`` for a hub data set. Raises DataError when there is none."""
        if self.is_hub:
            return []
        if is_uri(self.path):
            return self._remote_files()
        path = str(Path(self.path).expanduser())
        if Path(path).is_dir():
            return self._folder_files(Path(path))
        if Path(path).is_file():
            return [path]
        found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not found:
            raise DataError(self._missing(path))
        return found

    def _folder_files(self, folder: Path) -> list[str]:
        if (folder / "dataset_dict.json").is_file():  # a DatasetDict that ``datasets`` saved
            folder = folder / self.split
        names = sorted(str(name) for name in folder.rglob("*") if name.is_file() and suffix_of(name.name))
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            names = [name for name in names if name.endswith(".arrow")]
        if not names:
            raise DataError(f"{self.key}: the folder {folder} has no data file. Known kinds: {', '.join(READERS)}.")
        return names

    def _remote_files(self) -> list[str]:
        fs, inner = filesystem(self.path)
        scheme = self.path.split("://")[0]
        try:
            if glob.has_magic(inner):
                names = sorted(fs.glob(inner))
            elif fs.isdir(inner):
                names = sorted(name for name in fs.find(inner) if suffix_of(name))
            else:
                names = [inner] if fs.exists(inner) else []
        except Exception as error:  # every store has exceptions of its own
            raise MissingError(f"{self.key}: {self.path} cannot be reached: {_short(error)}") from error
        if not names:
            raise DataError(f"{self.key}: {self.path} does not exist.")
        return [f"{scheme}://{name}" for name in names]

    def _missing(self, path: str) -> str:
        if glob.has_magic(path):
            return f"{self.key}: no file matches {path}"
        folder, name = os.path.split(path)
        try:
            names = [entry.name for entry in Path(folder or ".").iterdir()]
        except OSError:
            return f"{self.key}: {path} does not exist (nor does the folder {folder})."
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        near = near or sorted(entry for entry in names if suffix_of(entry))[:3]
        hint = f" Files there: {', '.join(near)}." if near else ""
        return f"{self.key}: {path} does not exist.{hint}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def resolve(sources: Sources, key: str, settings: DataSettings) -> list[Source]:
    """The sources of ``data.train`` or ``data.eval`` with defaults filled in. Raises DataError for an empty list."""
    entries = sources if isinstance(sources, list) else [sources]
    if not entries:
        raise DataError(f"{key}: the list of sources is empty.")
    resolved = []
    for index, entry in enumerate(entries):
        entry = SourceSettings(path=entry) if isinstance(entry, str) else entry
        resolved.append(
            Source(
                key=f"{key}[{index}]" if isinstance(sources, list) else key,
                path=entry.path,
                weight=entry.weight,
                split=entry.split,
                format=entry.format or settings.format,
                columns=settings.columns if entry.columns is None else entry.columns,
            )
        )
    return resolved


def train_sources(settings: DataSettings, key: str = "data.train") -> list[Source]:
    """The sources of ``settings.train``, called ``key`` in messages and reports."""
    return resolve(settings.train, key, settings)


def eval_sources(settings: DataSettings) -> list[Source]:
    """The sources of ``data.eval``; ``[]`` when it is a split of the training rows or not there."""
    if settings.eval is None or isinstance(settings.eval, EvalSplitSettings):
        return []
    return resolve(settings.eval, "data.eval", settings)


def test_sources(settings: DataSettings) -> list[Source]:
    """The further test sets of ``data.guard.leaks.against``; their format is detected where it is not given."""
    leaks = settings.guard.leaks if settings.guard is not None else None
    if leaks is None or leaks.against is None:
        return []
    return resolve(leaks.against, "data.guard.leaks.against", settings.model_copy(update={"format": "auto"}))


def read(source: Source, *, streaming: bool = False) -> Rows:
    """All rows of a source in order; a hub data set is fetched whole, or with ``streaming`` as it is read.

    Raises DataError (missing, damaged) or MissingError (store or hub not reachable).
    """
    if source.is_hub:
        for number, row in enumerate(_load_hub(source, streaming=streaming), 1):
            yield RawRow(f"{source.path}:{number}", row)
        return
    for path in source.files():
        yield from read_file(path)


def _load_hub(source: Source, *, streaming: bool) -> Iterator[dict[str, Any]]:
    """Rows of a hub data set. Raises MissingError, which also says that a local file of this name does not exist."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingError.extra("datasets", "train") from None
    try:
        rows: Iterator[dict[str, Any]] = iter(load_dataset(source.path, split=source.split, streaming=streaming))
    except Exception as error:  # hub, network and builder errors have no common base
        raise MissingError(_hub_message(source, error)) from error
    return rows


def _hub_message(source: Source, error: Exception) -> str:
    return (
        f"{source.key}: {source.path} is no file here, and as a data set of the hub (split {source.split}) it could "
        f"not be loaded: {type(error).__name__}: {_short(error)}\n{_hub_advice(source.path)}"
    )


def _hub_advice(name: str) -> str:
    """What to do about a data set that the hub did not give."""
    folder = f"data/{name.rpartition('/')[2]}"
    off = next((v for v in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if _is_on(os.environ.get(v, ""))), "")
    return (
        (f"{off} is set: unset it if the hub can be reached. " if off else "")
        + "On a machine without the hub: where there is one, run "
        + f"`hf download {name} --repo-type dataset --local-dir {folder}`, copy the folder here, and name the files that "
        + f"you want, e.g. {folder}/**/train*.parquet. Otherwise check the name, and HF_TOKEN for a gated data set"
    )


def _is_on(value: str) -> bool:
    return value.upper() in ("1", "ON", "YES", "TRUE")


def digest(settings: DataSettings, key: str = "data.train") -> dict[str, str]:
    """Content digest of every file that the recipe names, by the file's name.

    Local files: ``sha256:…`` of the bytes. URIs: etag, else size and time. Hub data sets: the commit.
    ``key`` is what ``settings.train`` is called in the recipe. Raises DataError naming the key when a file is missing, MissingError when a store or the hub is away.
    """
    return digests_of([*train_sources(settings, key), *eval_sources(settings), *test_sources(settings)])


def digests_of(sources: Iterable[Source]) -> dict[str, str]:
    """The same for any sources."""
    digests: dict[str, str] = {}
    problems: list[str] = []
    for source in sources:
        try:
            if source.is_hub:
                digests[f"{source.path}@{source.split}"] = _hub_digest(source)
            for path in source.files():
                if path not in digests:
                    digests[path] = _remote_digest(path) if is_uri(path) else _file_digest(path, source.key)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return digests


def _file_digest(path: str, key: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror or error}") from None


def _remote_digest(uri: str) -> str:
    fs, inner = filesystem(uri)
    try:
        info = fs.info(inner)
    except Exception as error:  # every store has exceptions of its own
        raise MissingError(f"{uri} cannot be reached: {_short(error)}") from error
    for name in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(name):
            return f"etag:{str(info[name]).strip(chr(34))}"
    changed = info.get("LastModified") or info.get("mtime") or info.get("last_modified") or ""
    return f"size:{info.get('size')} changed:{changed}"


def _hub_digest(source: Source) -> str:
    """The commit of the data set on the hub; offline, the commit that is in the local hub cache."""
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        raise MissingError.extra("datasets", "train") from None
    try:
        return f"commit:{HfApi().dataset_info(source.path, timeout=10).sha}"
    except Exception as error:  # offline or unknown: only the local cache can tell
        name = f"datasets--{source.path.replace('/', '--')}"
        reference = Path(constants.HF_HUB_CACHE) / name / "refs" / "main"
        if reference.is_file():
            return f"commit:{reference.read_text(encoding='utf-8').strip()}"
        raise MissingError(_hub_message(source, error)) from error
