"""From rows to tokens, chunk by chunk: what prepared and streamed data have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, pairwise

import numpy as np

from llmkit.data import formats
from llmkit.data.readers import Rows
from llmkit.data.render import IGNORED, Renderer
from llmkit.data.report import SourceReport
from llmkit.data.rows import BadRow, Encoded, LeftOut, RawRow, Sample
from llmkit.data.settings import DataSettings
from llmkit.data.sources import Source, read
from llmkit.errors import DataError

CHUNK = 4_000
_LOOK_AT = 100


def chunks(rows: Rows, size: int = CHUNK) -> Iterator[list[RawRow | BadRow]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def open_source(
    source: Source, report: SourceReport, *, streaming: bool = False
) -> tuple[Rows, Callable[[RawRow], Sample | BadRow]]:
    """The rows of a source and the function that converts one; the format is decided from the first rows.

    Raises DataError when the format cannot be told, or ``columns`` names a field that it does not have.
    """
    rows = read(source, streaming=streaming)
    name = str(source.format)
    reason = "the recipe says so"
    if name == "auto":
        head = list(islice(rows, _LOOK_AT))
        rows = chain(head, rows)
        usable = [row for row in head if isinstance(row, RawRow)]
        if usable:
            name, reason = formats.detect(usable, source.columns, source.key)
        else:
            name, reason = "text", "no row could be read"
    else:
        formats.check_columns(name, source.columns, source.key)
    report.format, report.format_reason = name, reason
    return rows, formats.convert(name, source.columns)


class Drawer:
    """How often each row of a source is taken: a whole number by its weight, and a seeded share once more.

    Within any chunk the share is exact to one row, whatever pattern the rows are in.
    """

    def __init__(self, weight: float, seed: int, index: int) -> None:
        self._whole, self._share = int(weight), weight - int(weight)
        self._random = np.random.default_rng([seed & 0xFFFFFFFF, index])
        self._owed = 0.0

    def __call__(self, rows: int) -> list[int]:
        """Times that each of the next ``rows`` rows is taken."""
        counts = [self._whole] * rows
        if self._share:
            self._owed += rows * self._share
            extra = min(round(self._owed), rows)
            self._owed -= extra
            for row in self._random.permutation(rows)[:extra].tolist():
                counts[row] += 1
        return counts


def encode_chunk(
    chunk: Sequence[RawRow | BadRow],
    make: Callable[[RawRow], Sample | BadRow],
    renderer: Renderer,
    settings: DataSettings,
    report: SourceReport,
) -> list[list[Encoded]]:
    """Tokens of a chunk's rows: for each row the pieces to learn from, none when it is bad or dropped.

    Bad and too long rows go into ``report``. Raises DataError for what no single row is to blame for.
    """
    samples = [make(row) if isinstance(row, RawRow) else row for row in chunk]
    encoded = iter(renderer.encode([sample for sample in samples if not isinstance(sample, BadRow)]))
    made = [sample if isinstance(sample, BadRow) else next(encoded) for sample in samples]
    report.rows_read += len(chunk)
    return [_fit(row, settings, renderer.seq2seq, report) for row in made]


def _fit(row: Encoded | BadRow, settings: DataSettings, seq2seq: bool, report: SourceReport) -> list[Encoded]:
    if isinstance(row, LeftOut):
        report.rows_guarded += 1
        return []
    if isinstance(row, BadRow):
        report.bad.append(row)
        return []
    if not _learns(row, seq2seq):
        report.bad.append(BadRow(row.row_id, "nothing to learn: no token of the row is supervised"))
        return []
    longest = max(len(row.input_ids), len(row.labels))
    pieces = [row]
    if longest > settings.max_length:
        pieces = _shorten(row, longest, settings, seq2seq, report)
    if pieces:
        report.rows_used += 1
        if row.drift:
            report.drifted += 1
            report.first_drifted = report.first_drifted or row.row_id
    return pieces


def _learns(row: Encoded, seq2seq: bool) -> bool:
    """Whether a label counts: in a causal model the first token has nothing before it to be predicted from."""
    labels = row.labels if seq2seq else row.labels[1:]
    return bool(np.any(labels != IGNORED))


def _shorten(row: Encoded, longest: int, settings: DataSettings, seq2seq: bool, report: SourceReport) -> list[Encoded]:
    limit = settings.max_length
    if row.splittable:
        report.documents_split += 1
        return split_document(row, limit)
    if settings.on_too_long != "truncate":
        report.too_long.append((row.row_id, longest))
        return []
    cut = Encoded(row.row_id, row.input_ids[:limit], row.labels[:limit], False, row.drift)
    if not _learns(cut, seq2seq):
        reason = f"nothing left to learn after cutting at data.max_length: {limit}"
        report.bad.append(BadRow(row.row_id, reason))
        return []
    report.too_long.append((row.row_id, longest))
    return [cut]


def split_document(row: Encoded, limit: int) -> list[Encoded]:
    """Consecutive pieces of at most ``limit`` tokens, nothing lost; the last has at least two."""
    size = len(row.input_ids)
    cuts = [*range(0, size, limit), size]
    if cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1
    return [
        Encoded(f"{row.row_id}#{number}", row.input_ids[a:b], row.labels[a:b], True)
        for number, (a, b) in enumerate(pairwise(cuts), 1)
    ]


def content_hash(row: Encoded) -> int:
    """64 bits that are equal for rows of equal tokens and labels."""
    digest = hashlib.blake2b(row.input_ids.tobytes(), digest_size=8)
    digest.update(b"|")
    digest.update(row.labels.tobytes())
    return int.from_bytes(digest.digest(), "little")


def new_report(source: Source) -> SourceReport:
    return SourceReport(source.key, source.path, len(source.files()), source.weight)


def refuse_empty(report: SourceReport) -> None:
    """Raises DataError for a source without a row."""
    if report.rows_read == 0:
        raise DataError(f"{report.key}: {report.path} has no rows.")
