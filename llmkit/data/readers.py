"""Readers of one file: bytes in, ``RawRow`` or ``BadRow`` out, one at a time.

A damaged row is a ``BadRow``; a damaged container (gzip, Parquet, Arrow, a JSON document), from which an unknown number
of rows would be missing, is a ``DataError``.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llmkit.data.rows import BadRow, RawRow
from llmkit.errors import DataError, MissingError

Rows = Iterator[RawRow | BadRow]

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BATCH = 1_000


def is_uri(path: str) -> bool:
    """An fsspec URI such as ``s3://bucket/rows.jsonl`` (``file://`` too)."""
    return "://" in path


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path inside it.

    Raises MissingError when the package that speaks the protocol is not installed, DataError for an unknown protocol.
    """
    try:
        import fsspec
    except ImportError:
        raise MissingError.extra("fsspec", "train") from None
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except ImportError:
        raise MissingError.extra(f"the package for {uri.split('://')[0]}://", "s3") from None
    except ValueError as error:
        raise DataError(f"{uri}: {error}") from None
    return fs, str(path)


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a local file or a URI for reading, unpacking ``.gz``. Raises DataError when it cannot be read."""
    try:
        if is_uri(path):
            fs, inner = filesystem(path)
            raw: IO[bytes] = fs.open(inner, "rb")
        else:
            raw = Path(path).open("rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    with raw:
        yield cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if path.lower().endswith(".gz") else raw


def _damaged(path: str, error: Exception, where: str = "") -> DataError:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return DataError(f"{path}: damaged{where}: {text or type(error).__name__}. Restore the file or leave it out.")


def _lines(path: str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their number from 1; a broken gzip or disk is a DataError that says after which line."""
    number = 0
    lines = iter(stream)
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, error, f" after line {number:,}") from None
        number += 1
        yield number, line


def parse_json(text: str) -> Any:
    """``json.loads`` with one exception type: ValueError, its message short and with line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"invalid JSON at {where}: {error.msg}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None


def _as_row(row_id: str, value: Any) -> RawRow | BadRow:
    if isinstance(value, dict):
        return RawRow(row_id, value)
    return BadRow(row_id, f"the row is {_kind(value)}, not an object with named columns")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _decode(raw: bytes) -> str:
    """UTF-8 to text; ValueError with the byte that is wrong."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1} of the line") from None


def read_jsonl(path: str) -> Rows:
    """One JSON object a line; empty lines are no rows."""
    with open_bytes(path) as stream:
        for number, raw in _lines(path, stream):
            if number == 1:
                _refuse_utf16(path, raw)
                raw = raw.removeprefix(_BOM)
            if raw.isspace() or not raw:
                continue
            row_id = f"{path}:{number}"
            try:
                yield _as_row(row_id, parse_json(_decode(raw.rstrip(b"\r\n"))))
            except ValueError as error:
                yield BadRow(row_id, str(error))


def _refuse_utf16(path: str, start: bytes) -> None:
    if start.startswith(_UTF16):
        raise DataError(f"{path}: is UTF-16 text; save it as UTF-8.")


def _read_all(path: str) -> bytes:
    with open_bytes(path) as stream:
        try:
            return stream.read()
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, error) from None


def read_json(path: str) -> Rows:
    """A list of rows, ``{"data": [rows]}``, or lines of JSON under the wrong name; row ids count rows from 1."""
    raw = _read_all(path)
    _refuse_utf16(path, raw)
    try:
        value = parse_json(raw.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {error.start + 1}. Save it as UTF-8.") from None
    except ValueError as error:
        if _is_json_lines(raw):
            yield from read_jsonl(path)
            return
        raise DataError(f"{path}: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict) and _is_json_lines(raw):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f'{path}: holds {_kind(value)}; expected a list of rows or {{"data": [rows]}}.')
    for number, row in enumerate(value, 1):
        yield _as_row(f"{path}:{number}", row)


def _is_json_lines(raw: bytes) -> bool:
    first = raw.removeprefix(_BOM).lstrip().split(b"\n", 1)[0]
    try:
        return isinstance(parse_json(_decode(first)), dict)
    except ValueError:
        return False


def read_csv(path: str, delimiter: str = ",") -> Rows:
    """A header, then rows; quoted fields may hold line breaks. The row id is the line that the row starts on."""
    with open_bytes(path) as stream:
        text = (line.decode("utf-8", "surrogateescape") for line in _csv_lines(path, stream))
        limit = csv.field_size_limit(2**31 - 1)
        try:
            yield from _csv_rows(path, csv.reader(text, delimiter=delimiter, strict=True))
        finally:
            csv.field_size_limit(limit)


def _csv_lines(path: str, stream: IO[bytes]) -> Iterator[bytes]:
    for number, raw in _lines(path, stream):
        if number == 1:
            _refuse_utf16(path, raw)
            raw = raw.removeprefix(_BOM)
        yield raw


def _csv_rows(path: str, reader: Any) -> Rows:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"{path}:{line}: the header cannot be read: {error}") from None
            yield BadRow(f"{path}:{line}", f"invalid CSV: {error} (lines {line} to {reader.line_num})")
            continue
        if not fields:
            continue
        if header is None:
            header = _header(path, fields)
            continue
        yield _csv_row(f"{path}:{line}", header, fields)


def _header(path: str, fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    if _has_surrogate("".join(names)):
        raise DataError(f"{path}:1: the header is invalid UTF-8.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the header names {', '.join(map(repr, twice))} more than once.")
    return names


def _csv_row(row_id: str, header: list[str], fields: list[str]) -> RawRow | BadRow:
    if len(fields) != len(header):
        return BadRow(row_id, f"{len(fields)} fields where the header names {len(header)}")
    if any(map(_has_surrogate, fields)):
        return BadRow(row_id, "invalid UTF-8")
    return RawRow(row_id, dict(zip(header, fields, strict=True)))


def _has_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def read_tsv(path: str) -> Rows:
    return read_csv(path, "\t")


def read_txt(path: str) -> Rows:
    """The whole file is one document."""
    raw = _read_all(path)
    _refuse_utf16(path, raw)
    try:
        yield RawRow(f"{path}:1", {"text": raw.removeprefix(_BOM).decode("utf-8")})
    except UnicodeDecodeError as error:
        yield BadRow(f"{path}:1", f"invalid UTF-8 at byte {error.start + 1}")


def _batches(path: str, batches: Callable[[IO[bytes]], Iterator[Any]]) -> Rows:
    """Rows of record batches; whatever pyarrow raises over damaged bytes is a DataError."""
    import pyarrow as pa

    number = 0
    with open_bytes(path) as stream:
        try:
            for batch in batches(stream):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:{number}", row)
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError) as error:
            raise _damaged(path, error, f" after row {number:,}") from None


def read_parquet(path: str) -> Rows:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingError.extra("pyarrow", "train") from None

    def batches(stream: IO[bytes]) -> Iterator[Any]:
        yield from pq.ParquetFile(stream, page_checksum_verification=True).iter_batches(_BATCH)

    return _batches(path, batches)


def read_arrow(path: str) -> Rows:
    """Arrow IPC file (Feather 2) or stream, which is what ``datasets`` saves."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingError.extra("pyarrow", "train") from None

    def batches(stream: IO[bytes]) -> Iterator[Any]:
        head = stream.read(6)
        stream.seek(0)
        if head == b"ARROW1":
            reader = pa.ipc.open_file(stream)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        else:
            yield from pa.ipc.open_stream(stream)

    return _batches(path, batches)


READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_txt,
    ".md": read_txt,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}


def suffix_of(path: str) -> str:
    """``.jsonl`` for ``rows.jsonl`` and for ``rows.jsonl.gz``, ``""`` when no reader knows it."""
    name = path.lower().split("?")[0].removesuffix(".gz")
    dot = name.rfind(".")
    suffix = name[dot:] if dot > name.rfind("/") else ""
    return suffix if suffix in READERS else ""


def read_file(path: str) -> Rows:
    """All rows of one file, by its suffix. Raises DataError for an unknown suffix or a damaged file."""
    suffix = suffix_of(path)
    if not suffix:
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(READERS)}, text ones also with .gz.")
    return READERS[suffix](path)
