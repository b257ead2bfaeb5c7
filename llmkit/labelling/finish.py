"""From the shards of votes to ``labels/`` (what training takes), ``abstained/`` and the report."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmkit.context import RunContext
from llmkit.data.formats import FORMATS
from llmkit.labelling import gold as golds
from llmkit.labelling import report
from llmkit.labelling.agreement import MISSING
from llmkit.labelling.combine import LabelModel, dawid_skene
from llmkit.labelling.decide import Decided, combined, decide, decide_text, same_json, same_text
from llmkit.labelling.voters import Prompts
from llmkit.labelling.work import ANSWERS, CONFIDENCES, PROBABILITIES, PROMPT, VOTES

if TYPE_CHECKING:
    from llmkit.stages.label import Recipe

LABELS, ABSTAINED = "labels", "abstained"
MADE = ("prompt", "completion", "label", "answer", "confidence", "agreement", "probabilities", "labelled_by", "reason")
"""Columns of the output; a column of the input of that name, or one of ``FIRST``, is carried along as ``input_…``."""
FIRST = tuple(n for f in takewhile(lambda f: f != "prompt_completion", FORMATS) for n in FORMATS[f].needs)
"""Columns by which training would take the rows to be of another format, looked for before prompt and completion."""
_SHOWN = 20


@dataclass
class Found:
    """What the whole job came to, for the report."""

    voters: Sequence[str]
    names: Sequence[str] = ()
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    confidence: list[NDArray[np.float64]] = field(default_factory=list)
    agreement: list[NDArray[np.float64]] = field(default_factory=list)
    votes: list[NDArray[np.int64]] = field(default_factory=list)
    label: list[NDArray[np.int64]] = field(default_factory=list)
    gold: list[NDArray[np.int64]] = field(default_factory=list)
    texts: golds.TextScore = field(default_factory=golds.TextScore)
    abstained: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, str]] = field(default_factory=list)
    model: LabelModel | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    metrics: Mapping[str, float]
    artifacts: Mapping[str, str]
    samples: Sequence[Mapping[str, str]]


def finish(recipe: Recipe, shards: Sequence[Path], ctx: RunContext) -> Finished:
    """Decide every row, write the output and the report, and record them. Raises DataError for gold labels of no use."""
    maker = _Maker(recipe, shards)
    for folder in (LABELS, ABSTAINED):
        shutil.rmtree(ctx.output_dir / folder, ignore_errors=True)
        (ctx.output_dir / folder).mkdir()
    for shard in shards:
        labelled, abstained = maker.divided(pq.read_table(shard))
        for folder, table in ((LABELS, labelled), (ABSTAINED, abstained)):
            if table.num_rows:
                pq.write_table(table, ctx.output_dir / folder / shard.name)
    found = maker.found
    metrics = report.metrics_of(found)
    ctx.tracker.metrics(metrics, 0)
    files = report.write(found, metrics, recipe.name, ctx.output_dir)
    for path in files.values():
        ctx.tracker.artifact(path)
    ctx.progress.note(report.summary(metrics))
    artifacts = {name: path.name for name, path in files.items()} | {LABELS: LABELS, ABSTAINED: ABSTAINED}
    return Finished(metrics, artifacts, found.shown)


class _Maker:
    """Makes the output of one shard after the other, and gathers what the report tells."""

    def __init__(self, recipe: Recipe, shards: Sequence[Path]) -> None:
        self._recipe, self._shards = recipe, shards
        self._prompts = Prompts(recipe)
        self._labels = self._prompts.labels
        self._gold = golds.open_gold(recipe.gold, self._labels)
        self.found = Found([voter.name for voter in self._prompts.voters], self._labels.names if self._labels else ())
        self._at = 0
        weights = recipe.combine.weights
        self._weights = np.array(
            [weights.get(voter.name, weights.get(voter.model.label, 1.0)) for voter in self._prompts.voters]
        )
        self._source = json.dumps(
            {
                "run": recipe.name, "models": [model.label for model in recipe.all_models],
                "templates": [f"{one.title} sha256:{one.digest[:12]}" for one in self._prompts.templates],
            },
            ensure_ascii=False,
        )  # fmt: skip

    def divided(self, shard: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The rows of a shard that got a label, and those that did not."""
        labelled, reasons = self._texts(shard) if self._labels is None else self._classes(shard)
        kept = np.array([not reason for reason in reasons], dtype=bool)
        whole = self._carried(shard)
        for name, column in labelled.items():
            whole = whole.append_column(name, column)
        self.found.reasons.update(reason for reason in reasons if reason)
        source = pa.array([self._source] * shard.num_rows).dictionary_encode()
        good = whole.append_column("labelled_by", source).filter(pa.array(kept))
        bad = whole.append_column("reason", pa.array(reasons, pa.string())).filter(pa.array(~kept))
        self._show(bad, good)
        return good, bad.drop_columns([name for name in ("completion",) if name in bad.column_names])

    def _carried(self, shard: pa.Table) -> pa.Table:
        """The input's columns, out of the way of ours."""
        own = {PROMPT, VOTES, PROBABILITIES, ANSWERS, CONFIDENCES}
        taken = {*MADE, *FIRST}
        kept = shard.select([name for name in shard.column_names if name not in own])
        return kept.rename_columns([f"input_{name}" if name in taken else name for name in kept.column_names])

    def _pairs(self, shard: pa.Table, texts: Sequence[str | None]) -> dict[str, pa.Array]:
        """``prompt`` and ``completion``, as ``llmkit sft`` takes them."""
        prompt = shard.column(PROMPT)
        if pa.types.is_string(prompt.type):
            return {"prompt": prompt, "completion": pa.array(texts, pa.string())}
        turns = [None if text is None else [{"role": "assistant", "content": text}] for text in texts]
        return {"prompt": prompt, "completion": pa.array(turns, prompt.type)}

    # ---- labels ----

    def _classes(self, shard: pa.Table) -> tuple[dict[str, pa.Array], Sequence[str]]:
        assert self._labels is not None
        votes, shares = self._votes(shard), self._shares(shard)
        if self._recipe.combine.rule == "dawid-skene":
            probabilities = self._label_model.probabilities[self._at : self._at + len(votes)]
        else:
            probabilities = combined(votes, shares, self._recipe.combine, self._weights)
        self._at += len(votes)
        made = decide(votes, probabilities, self._recipe.abstain)
        self._gather(made, votes, shard)
        names = [None if label == MISSING else self._labels.names[label] for label in made.best]
        texts = [None if label == MISSING else self._labels.texts[label] for label in made.label]
        width = len(self._labels)
        flat = pa.array(probabilities.astype(np.float32).ravel())
        return {
            **self._pairs(shard, texts),
            "label": pa.array(names, pa.string()),
            "confidence": pa.array(made.confidence, pa.float64(), from_pandas=True),
            "agreement": pa.array(made.agreement, pa.float64(), from_pandas=True),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, width),
        }, made.reasons

    def _votes(self, shard: pa.Table) -> NDArray[np.int64]:
        found = shard.column(VOTES).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        votes: NDArray[np.int64] = found.astype(np.int64).reshape(shard.num_rows, -1)
        return votes

    def _shares(self, shard: pa.Table) -> NDArray[np.float64]:
        assert self._labels is not None
        found = shard.column(PROBABILITIES).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        shares: NDArray[np.float64] = found.astype(np.float64).reshape(shard.num_rows, -1, len(self._labels))
        return shares

    @cached_property
    def _label_model(self) -> LabelModel:
        """Dawid–Skene over the votes of the whole job."""
        assert self._labels is not None
        votes = np.concatenate([self._votes(pq.read_table(shard, columns=[VOTES])) for shard in self._shards])
        found = dawid_skene(votes, len(self._labels))
        if not found.converged:
            self.found.notes.append(f"The label model had not settled after {found.rounds} rounds.")
        self.found.model = found
        return found

    def _gather(self, made: Decided, votes: NDArray[np.int64], shard: pa.Table) -> None:
        assert self._labels is not None
        found, samples = self.found, self._recipe.samples
        found.counts.update(self._labels.names[label] for label in made.label if label != MISSING)
        found.confidence.append(made.confidence)
        found.agreement.append(made.agreement)
        found.label.append(made.label)
        found.votes.append(votes[:, ::samples])  # each voter's first vote
        if self._gold is not None:
            found.gold.append(self._gold.indices(shard))

    # ---- texts ----

    @cached_property
    def _usable(self) -> list[Callable[[str], str | None]]:
        made = []
        for voter in self._prompts.voters:
            schema = self._prompts.templates[voter.template].output_schema
            made += [same_text if schema is None else same_json(schema)] * self._recipe.samples
        return made

    def _texts(self, shard: pa.Table) -> tuple[dict[str, pa.Array], Sequence[str]]:
        weights = np.repeat(self._weights, self._recipe.samples).tolist()
        answers, confidences = shard.column(ANSWERS).to_pylist(), shard.column(CONFIDENCES).to_pylist()
        made = [
            decide_text(texts, sure, weights, self._usable, self._recipe.abstain)
            for texts, sure in zip(answers, confidences, strict=True)
        ]  # fmt: skip
        sure, agreed = np.array([one.confidence for one in made]), np.array([one.agreement for one in made])
        self.found.confidence.append(sure)
        self.found.agreement.append(agreed)
        if self._gold is not None:
            self.found.texts.add([one.text for one in made], self._gold.texts(shard))
        texts = [one.text for one in made]
        return {
            **self._pairs(shard, texts),
            "answer": pa.array([one.best for one in made], pa.string()),
            "confidence": pa.array(sure, pa.float64(), from_pandas=True),
            "agreement": pa.array(agreed, pa.float64(), from_pandas=True),
        }, [one.reason for one in made]

    def _show(self, bad: pa.Table, good: pa.Table) -> None:
        """Keep the first of both for the report and the summary."""
        result = "answer" if self._labels is None else "label"
        for row in bad.slice(0, max(0, _SHOWN - len(self.found.abstained))).to_pylist():
            keys = (result, "confidence", "agreement", "reason")
            self.found.abstained.append({"prompt": report.asked(row["prompt"]), **{key: row[key] for key in keys}})
        for row in good.slice(0, max(0, 3 - len(self.found.shown))).to_pylist():
            self.found.shown.append({"prompt": report.asked(row["prompt"]), "after": row[result]})
