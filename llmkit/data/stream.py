"""Rows tokenized on the fly, for data larger than the disk: endless, in a seeded order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.data import report as reports
from llmkit.data.guard.gate import StreamGuard
from llmkit.data.pipeline import Drawer, chunks, encode_chunk, new_report, open_source, refuse_empty
from llmkit.data.readers import is_uri
from llmkit.data.render import Renderer
from llmkit.data.report import SourceReport
from llmkit.data.rows import BadRow, RawRow, Sample
from llmkit.data.settings import DataSettings
from llmkit.data.sources import Source, train_sources
from llmkit.errors import DataError

BUFFER = 10_000
"""Rows that the shuffle chooses from."""
_BATCH = 256

Row = tuple[str, NDArray[np.int32], NDArray[np.int32]]
Make = Callable[[RawRow], Sample | BadRow]
_Item = tuple[int, RawRow | BadRow]


class TokenStream:
    """Iterates ``(row_id, input_ids, labels)`` without end: after the last row the next epoch begins in another order.

    Sources are read lazily and mixed at random by weight and size; of the shuffled rows, rank r of n takes every n-th.
    Every iteration starts again from the first row, less those of ``skip``; the order depends on the data, the
    settings, the seed and the number of ranks only. Bad and too long rows are handled as the recipe says and counted
    in ``reports``. Iterating raises DataError for them (``error``), and when an epoch yields nothing.
    """

    def __init__(
        self, settings: DataSettings, renderer: Renderer, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self._settings, self._renderer, self._seed = settings, renderer, seed
        self._rank, self._world = rank, world_size
        self._sources = train_sources(settings)
        self._skip = 0
        sizes = [_size(source) for source in self._sources]
        self._sizes = sizes if all(sizes) else [1] * len(sizes)
        self.reports: list[SourceReport] = [new_report(source) for source in self._sources]
        self._guard = StreamGuard(settings.guard) if settings.guard is not None else None

    def guarded(self) -> dict[str, Any]:
        """What ``data.guard`` found in the rows read so far, for the report; ``{}`` without it."""
        return self._guard.to_dict() if self._guard is not None else {}

    def skip(self, rows: int) -> TokenStream:
        """Leave out the first ``rows`` rows of this rank, as a resumed run does. Returns the stream itself."""
        self._skip = rows
        return self

    def __iter__(self) -> Iterator[Row]:
        self.reports = [new_report(source) for source in self._sources]
        left = self._skip
        epoch = 0
        while True:
            given = 0
            for row in self._epoch(epoch):
                given += 1
                if left:
                    left -= 1
                else:
                    yield row
            if not given:
                read = sum(report.rows_read for report in self.reports)
                raise DataError(f"data.train: of {read:,} rows, none is left to learn from on rank {self._rank}.")
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Row]:
        opened = [
            open_source(source, report, streaming=True)
            for source, report in zip(self._sources, self.reports, strict=True)
        ]
        makers = [make for _, make in opened]
        if self._guard is not None:
            makers = [self._guard.around(make, source.key) for make, source in zip(makers, self._sources, strict=True)]
        started = [_started(rows, report) for (rows, _), report in zip(opened, self.reports, strict=True)]
        mixed = self._mix(started, epoch)
        order = self._shuffled(mixed, epoch) if self._settings.shuffle else mixed
        batch: list[_Item] = []
        for number, item in enumerate(order):
            if number % self._world == self._rank:
                batch.append(item)
            if len(batch) == _BATCH:
                yield from self._encode(batch, makers)
                batch = []
        yield from self._encode(batch, makers)

    def _mix(self, sources: list[Iterator[RawRow | BadRow]], epoch: int) -> Iterator[_Item]:
        """Rows of all sources, the next one's source drawn by what it has to give: its size times its weight."""
        seed = self._seed + epoch
        drawn = [_drawn(rows, Drawer(self._sources[n].weight, seed, n)) for n, rows in enumerate(sources)]
        shares = [size * source.weight for size, source in zip(self._sizes, self._sources, strict=True)]
        open_sources = list(range(len(drawn)))
        random = np.random.default_rng([seed & 0xFFFFFFFF, 1])
        while open_sources:
            weights = np.array([shares[n] for n in open_sources])
            chosen = open_sources[int(random.choice(len(open_sources), p=weights / weights.sum()))]
            if len(open_sources) == 1:
                yield from ((chosen, row) for row in drawn[chosen])
                return
            row = next(drawn[chosen], None)
            if row is None:
                open_sources.remove(chosen)
            else:
                yield chosen, row

    def _shuffled(self, items: Iterator[_Item], epoch: int) -> Iterator[_Item]:
        random = np.random.default_rng([(self._seed + epoch) & 0xFFFFFFFF, 2])
        buffer: list[_Item] = []
        for item in items:
            if len(buffer) < BUFFER:
                buffer.append(item)
                continue
            place = int(random.integers(BUFFER))
            yield buffer[place]
            buffer[place] = item
        for place in random.permutation(len(buffer)).tolist():
            yield buffer[place]

    def _encode(self, batch: list[_Item], makers: list[Make]) -> Iterator[Row]:
        """Tokens of a batch, in its order, whatever sources its rows come from."""
        by_source: dict[int, list[int]] = {}
        for place, (source, _) in enumerate(batch):
            by_source.setdefault(source, []).append(place)
        rows: dict[int, list[Row]] = {}
        for source, places in by_source.items():
            chunk = [batch[place][1] for place in places]
            encoded = encode_chunk(chunk, makers[source], self._renderer, self._settings, self.reports[source])
            for place, pieces in zip(places, encoded, strict=True):
                rows[place] = [(piece.row_id, piece.input_ids, piece.labels) for piece in pieces]
        self._refuse()
        for place in range(len(batch)):
            yield from rows[place]

    def _refuse(self) -> None:
        """Raises DataError for rows that the recipe does not allow."""
        settings = self._settings
        wrong = [report for report in self.reports if report.bad or report.too_long]
        strict = (settings.on_bad_row == "error" and any(report.bad for report in wrong)) or (
            settings.on_too_long == "error" and any(report.too_long for report in wrong)
        )
        if strict:
            raise DataError("\n".join(reports.problems(self.reports, settings)))


def _drawn(rows: Iterator[RawRow | BadRow], draw: Drawer) -> Iterator[RawRow | BadRow]:
    for chunk in chunks(rows):
        for row, count in zip(chunk, draw(len(chunk)), strict=True):
            for _ in range(count):
                yield row


def _started(rows: Iterator[RawRow | BadRow], report: SourceReport) -> Iterator[RawRow | BadRow]:
    """The same rows, once it is known that there is one. Raises DataError for none."""
    first = next(rows, None)
    if first is None:
        refuse_empty(report)
        return iter(())
    return chain([first], rows)


def _size(source: Source) -> int:
    """Bytes of a source, to mix by; 0 where it cannot be told."""
    files = source.files()
    if not files or any(map(is_uri, files)):
        return 0
    return max(1, sum(Path(path).stat().st_size for path in files))
