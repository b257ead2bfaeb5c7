"""Run a batch job: read, find equal rows, prepare ahead, compute, keep, tell.

What comes out does not depend on how often the job was killed: chunks are the same rows on every start, equal rows are
looked for in the same ones, and a shard is either complete or made anew.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmkit import __version__
from llmkit.context import RunContext, Task
from llmkit.data.rows import RawRow
from llmkit.errors import DataError, StoppedEarly
from llmkit.inference.batch import reading
from llmkit.inference.batch.ahead import Ahead
from llmkit.inference.batch.assemble import WINDOW, Chunk, Done, Kept, Worked, finish, planned, restored
from llmkit.inference.batch.settings import BatchRecipe
from llmkit.inference.batch.shards import FOLDER, Shard, Store, write_atomic
from llmkit.inference.batch.work import WORKS, RowError, Work, open_work
from llmkit.modeling.devices import this_machine

MANIFEST, ERRORS, DROPPED = "manifest.json", "errors.jsonl", "dropped.jsonl"
_TOLD = 5
"""Bad rows that an error names."""


@dataclass(frozen=True)
class BatchReport:
    """``shards`` in the order of the rows; ``metrics`` are numbers of the whole job, speeds those of this start."""

    shards: Sequence[Path]
    metrics: Mapping[str, float]
    artifacts: Mapping[str, str]


@dataclass
class _Meter:
    """What this start has done."""

    began: float = field(default_factory=time.perf_counter)
    rows: int = 0
    tokens: int = 0

    def speeds(self, cost_per_hour: float | None) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self.began)
        found = {"rows_per_second": self.rows / seconds, "tokens_per_second": self.tokens / seconds, "seconds": seconds}
        return found | ({"cost": cost_per_hour * seconds / 3600} if cost_per_hour is not None else {})


def run_batch(recipe: BatchRecipe, ctx: RunContext, stage: str) -> BatchReport:
    """Work on every row of the recipe's input, and keep the output in shards under the run's folder.

    Raises DataError for more bad rows than ``max_errors`` (all that were seen are in ``errors.jsonl``), StoppedEarly after
    a signal, UsageError where the folder holds shards that were computed otherwise.
    """
    work = open_work(WORKS[stage], recipe)
    store = Store.open(ctx.output_dir, _identity(recipe, work, stage))
    for name in store.damaged:
        ctx.progress.note(f"{name} is damaged or gone: it is made anew")
    if store.done:
        ctx.progress.note(f"Going on after {len(store.done)} complete shards")
    job = _Job(recipe, ctx, stage, work, store)
    total = reading.count(recipe.input)
    with ctx.progress.task(stage, total=total, unit="rows") as task, Ahead(WORKS[stage], recipe, work) as engine:
        for chunk, worked in engine.work_on(job.chunks()):
            job.take(chunk, worked, task)
    job.check_errors()
    return job.report()


def _identity(recipe: BatchRecipe, work: Work, stage: str) -> dict[str, Any]:
    return {
        "stage": stage, "llmkit": __version__, "rows_per_shard": recipe.output.rows_per_shard,
        "row_id": recipe.output.row_id, "keep": recipe.input.keep, "added": _text(work.schema()), **work.identity(),
    }  # fmt: skip


class _Job:
    """One start of a job."""

    def __init__(self, recipe: BatchRecipe, ctx: RunContext, stage: str, work: Work, store: Store) -> None:
        self.recipe, self.ctx, self.stage, self.work, self.store = recipe, ctx, stage, work, store
        self.added = work.schema()
        self.kept = Kept(recipe.input.keep, recipe.output.row_id, self.added, None)
        self.before: dict[int, Done] = {}
        self.meter = _Meter()
        self.cost_per_hour = this_machine().cost_per_hour

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk. The complete ones are read too: later rows may equal theirs."""
        for chunk in planned(self.recipe, self.work, self.kept):
            chunk.complete = chunk.number in self.store.done
            yield chunk

    def take(self, chunk: Chunk, worked: Worked | None, task: Task) -> None:
        """Keep what was made of a chunk; None is given for one that is complete."""
        if worked is not None:
            self._keep(chunk, worked)
        elif self._is_needed(chunk.number):
            self._remember(chunk.number, self._restored(chunk.number))
        task.advance(len(chunk.rows))
        if worked is None:
            return
        self._tell(chunk)
        self.check_errors()
        if self.ctx.stop.requested:
            left = "The same command goes on after the last complete shard."
            raise StoppedEarly(f"Stopped by {self.ctx.stop.reason} after shard {chunk.number}. {left}")

    def _is_needed(self, number: int) -> bool:
        """Whether a chunk that is still to do may hold rows equal to those of this one."""
        return any(later not in self.store.done for later in range(number + 1, number + WINDOW + 1))

    def _restored(self, number: int) -> Done:
        shard = self.store.done[number]
        errors = {at: RowError(why) for at, _, why in shard.errors}
        errors |= {at: RowError(why, dropped=True) for at, _, why in shard.dropped}
        table = pq.read_table(self.store.path(number), columns=self.added.names)
        return restored(table, self.added, errors, shard.read)

    def _remember(self, number: int, done: Done) -> None:
        self.before[number] = done
        self.before.pop(number - WINDOW - 1, None)

    def _keep(self, chunk: Chunk, worked: Worked) -> None:
        done = finish(chunk, worked, self.added, self.before)
        self._remember(chunk.number, done)
        good = [row for row, how in zip(chunk.rows, done.outcomes, strict=True) if not isinstance(how, RowError)]
        bad = [
            (i, row.row_id, how) for i, (row, how) in enumerate(zip(chunk.rows, done.outcomes, strict=True))
            if isinstance(how, RowError)
        ]  # fmt: skip
        table = (
            self.kept.table([row for row in good if isinstance(row, RawRow)]) if self.kept.schema is not None else None
        )
        if table is None:  # not one row of the input so far can be read
            table = pa.table({})
        for name in self.added.names:
            table = table.append_column(self.added.field(name), done.added.column(name))
        digest = self.store.write(chunk.number, table)
        copies = sum(at is not None for at in chunk.origin) - len(chunk.new)
        shard = Shard(
            self.store.path(chunk.number).name, len(chunk.rows), table.num_rows, digest, worked.computed.tokens, copies,
            round(worked.seconds, 3), tuple((i, at, how.reason) for i, at, how in bad if not how.dropped),
            tuple((i, at, how.reason) for i, at, how in bad if how.dropped),
        )  # fmt: skip
        assert shard.rows + len(bad) == shard.read
        self.store.add(chunk.number, shard)
        self.meter.rows += shard.read
        self.meter.tokens += shard.tokens

    def _tell(self, chunk: Chunk) -> None:
        self.ctx.tracker.metrics(self._numbers() | self.meter.speeds(self.cost_per_hour), chunk.number + 1)

    def _numbers(self) -> dict[str, float]:
        shards = self.store.done.values()
        return {
            "rows_read": sum(s.read for s in shards), "rows": sum(s.rows for s in shards),
            "errors": sum(len(s.errors) for s in shards), "dropped": sum(len(s.dropped) for s in shards),
            "duplicates": sum(s.duplicates for s in shards), "tokens": sum(s.tokens for s in shards),
        }  # fmt: skip

    def check_errors(self) -> None:
        """Raises DataError for more bad rows than the recipe allows."""
        if sum(len(shard.errors) for shard in self.store.done.values()) <= self.recipe.max_errors:
            return
        errors = [one for _, shard in sorted(self.store.done.items()) for one in shard.errors]
        self._write_rows(ERRORS, "errors")
        first = "\n".join(f"    {row}: {why}" for _, row, why in errors[:_TOLD])
        raise DataError(
            f"{len(errors):,} rows failed, max_errors is {self.recipe.max_errors}. The first:\n{first}\n"
            f"All of them: {self.ctx.output_dir / ERRORS}. Mend the rows, or start with a higher max_errors."
        )

    def _write_rows(self, name: str, kind: str) -> int:
        """Bad or dropped rows of all shards as a file; it is not written where there are none."""
        found = [one for _, shard in sorted(self.store.done.items()) for one in getattr(shard, kind)]
        if found:
            lines = [json.dumps({"row": row, "reason": why}, ensure_ascii=False) + "\n" for _, row, why in found]
            write_atomic(self.ctx.output_dir / name, "".join(lines))
        return len(found)

    def report(self) -> BatchReport:
        """Write the manifest, record the output as a data set, and give the numbers."""
        if not self.store.done:
            raise DataError(f"{', '.join(self.recipe.input.paths)} has no rows.")
        numbers = self._numbers()
        assert numbers["rows"] + numbers["errors"] + numbers["dropped"] == numbers["rows_read"]
        left_out = {"errors": ERRORS, "dropped": DROPPED}
        artifacts = {kind: name for kind, name in left_out.items() if self._write_rows(name, kind)}
        artifacts |= {"shards": FOLDER, "manifest": MANIFEST}
        digests = {s.name: s.sha256 for _, s in sorted(self.store.done.items())}
        manifest = {
            "identity": _identity(self.recipe, self.work, self.stage), "input": dict(self.recipe.input_digests()),
            **numbers, "shards": [
                {"name": s.name, "rows": s.rows, "read": s.read, "sha256": s.sha256} for _, s in sorted(self.store.done.items())
            ],
        }  # fmt: skip
        path = self.ctx.output_dir / MANIFEST
        write_atomic(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        self.ctx.tracker.artifact(path)
        for name, digest in self.recipe.input_digests().items():
            self.ctx.tracker.dataset(name.rsplit("/", 1)[-1], digest, name, "input", {"rows": numbers["rows_read"]})
        self.ctx.tracker.dataset(
            f"{self.recipe.name}-output", _digest_of(digests), str(self.ctx.output_dir / FOLDER), "output",
            {"rows": numbers["rows"], "shards": len(digests)},
        )  # fmt: skip
        return BatchReport(self.store.paths(), numbers | self.meter.speeds(self.cost_per_hour), artifacts)


def _text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def _digest_of(digests: Mapping[str, str]) -> str:
    import hashlib

    return "sha256:" + hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
