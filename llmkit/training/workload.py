"""How much a recipe trains on, before anything is tokenized: rows, tokens, and how many go through the model at once.

From ``data_report.json`` where an earlier start has prepared the same data, else from the first rows of each source.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from llmkit.data import formats
from llmkit.data.readers import is_uri, read_file
from llmkit.data.rows import BadRow, Conversation, PromptCompletion, RawRow, Sample, Text
from llmkit.data.settings import DataSettings, EvalSplitSettings
from llmkit.data.sources import Source, train_sources
from llmkit.errors import LlmkitError, MissingError
from llmkit.modeling.locate import find_folder
from llmkit.modeling.memory import QUERY_BLOCK
from llmkit.modeling.settings import ModelSettings
from llmkit.training.settings import TrainingRecipe
from llmkit.training.shapes import rounded_up
from llmkit.uris import workplace

ROWS = 400
"""Rows of each source that are looked at."""
PACKED = 0.97
"""Share of a packed sequence that is filled; best fit leaves a few per cent."""
BYTES_PER_TOKEN = 4.0
"""Where there is no tokenizer to ask: about what English takes with vocabularies of 30,000 to 150,000."""
MARKERS = 5
"""Tokens that a chat template puts around a message: role, markers, line ends."""
_DRAWN = 500
_WHOLE = 200_000_000
_REPORT = "data_report.json"


@dataclass(frozen=True)
class Workload:
    """What a recipe trains on. ``rows`` and ``tokens`` of one epoch are None where they cannot be known.

    ``lengths`` are the lengths of some rows in tokens, none longer than ``data.max_length``; ``supervised`` the share of
    tokens that is learned; ``source`` says where the figures are from.
    """

    lengths: tuple[int, ...]
    supervised: float
    source: str
    rows: int | None = None
    tokens: int | None = None

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Passes:
    """``tokens`` of the largest part that goes through the model at once, ``row`` the longest row, ``parts`` of a batch.

    ``totals`` and ``blocks`` count different shapes: of whole parts, and of blocks of attention in them (attention.py).
    """

    tokens: int
    row: int
    parts: int
    totals: int = 1
    blocks: int = 0


def workload(recipe: TrainingRecipe) -> Workload:
    """What the recipe trains on, as far as it can be told cheaply. Raises DataError where a source is not there."""
    return _prepared(recipe) or _sampled(recipe)


def sequences(recipe: TrainingRecipe, load: Workload) -> int | None:
    """Sequences of one epoch: packed ones, or rows."""
    if not recipe.data.packing:
        return load.rows
    return None if load.tokens is None else max(1, math.ceil(load.tokens / (recipe.data.max_length * PACKED)))


def passes(
    recipe: TrainingRecipe, load: Workload, *, batch: int, part_tokens: int, batches: int, seq2seq: bool
) -> Passes:
    """The largest part among ``batches`` batches of ``batch`` sequences, drawn from the known lengths.

    ``part_tokens`` bounds a part, 0 for no bound; a sequence is never cut (training/batching.py).
    """
    draw = random.Random(recipe.seed)
    largest = parts = longest = 0
    totals: set[int] = set()
    blocks: set[tuple[int, int, int]] = set()
    for _ in range(max(1, min(batches, _DRAWN))):
        drawn = [_sequence(recipe, load, draw) for _ in range(batch)]
        sizes = [recipe.data.max_length if recipe.data.packing else sum(rows) for rows in drawn]
        longest = max(longest, *(row for rows in drawn for row in rows))
        if seq2seq:  # padded to the longest, input and answer
            largest, parts = max(largest, 2 * batch * max(sizes)), max(parts, 1)
            continue
        groups = _groups(sizes, part_tokens)
        largest, parts = max(largest, *(sum(sizes[i] for i in group) for group in groups)), max(parts, len(groups))
        for group in groups:
            rows = [row for i in group for row in drawn[i]]
            total = rounded_up(sum(rows))
            totals.add(total)
            blocks |= {(total, *block) for row in rows for block in _blocks(row)}
    return Passes(largest, longest, parts, max(1, len(totals)), len(blocks))


def _groups(sizes: list[int], part_tokens: int) -> list[list[int]]:
    """Sequences by number, as training/batching.py divides a batch into parts."""
    groups: list[list[int]] = [[]]
    held = 0
    for number, size in enumerate(sizes):
        if groups[-1] and part_tokens and held + size > part_tokens:
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += size
    return groups


def _sequence(recipe: TrainingRecipe, load: Workload, draw: random.Random) -> list[int]:
    """Lengths of the rows of one sequence. Packed: rows that fill it but for a few per cent, as best fit does."""
    if not recipe.data.packing:
        return [draw.choice(load.lengths)]
    room = recipe.data.max_length - draw.randrange(1 + round(2 * (1 - PACKED) * recipe.data.max_length))
    rows: list[int] = []
    while room > 0:
        rows.append(min(room, draw.choice(load.lengths)))
        room -= rows[-1]
    return rows


def _blocks(row: int) -> Iterator[tuple[int, int]]:
    """Queries and keys of the blocks that a row's attention is computed in, rounded up."""
    for first in range(0, row, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, row)
        yield rounded_up(last - first), rounded_up(last)


# From an earlier start


def _prepared(recipe: TrainingRecipe) -> Workload | None:
    """The figures of ``data_report.json`` in the output folder, where it was made of the same sources."""
    path = workplace(recipe.output_dir, recipe.launch.scratch_dir) / _REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        train = report["train"]
        named = [source["path"] for source in report["sources"]]
        same = report["max_length"] == recipe.data.max_length
        wanted = [source.path for source in train_sources(recipe.data)]
        lengths = train["lengths"]
        if not same or named[: len(wanted)] != wanted or not train["rows"]:
            return None
        marks = sorted((float(key[1:]) / 100, float(value)) for key, value in lengths.items() if key[0] == "p")
        spread = _spread([(0.0, float(lengths["min"])), *marks, (1.0, float(lengths["max"]))])
        return Workload(
            lengths=tuple(min(n, recipe.data.max_length) for n in spread),
            supervised=train["supervised_tokens"] / train["tokens"],
            source=f"{path} of an earlier start",
            rows=int(train["rows"]),
            tokens=int(train["tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError, LlmkitError):
        return None


def _spread(marks: list[tuple[float, float]]) -> list[int]:
    """Lengths that have the given percentiles, evenly between them."""
    found = []
    for (low, a), (high, b) in pairwise(marks):
        count = max(1, round((high - low) * 200))
        found += [max(1, round(a + (b - a) * (i + 0.5) / count)) for i in range(count)]
    return [*found, max(1, round(marks[-1][1]))]


# From the first rows


def _sampled(recipe: TrainingRecipe) -> Workload:
    data = recipe.data
    count, how = _counter(recipe.model)
    looks = [_look(source, data, count, as_text=data.format == "text") for source in train_sources(data)]
    known = [look for look in looks if look is not None]
    if not known:
        return Workload(
            (data.max_length,), 1.0, "no row could be read beforehand: every row is taken to be data.max_length long"
        )
    lengths = tuple(n for look in known for n in look.lengths) or (data.max_length,)
    rows: int | None = None
    tokens: int | None = None
    if len(known) == len(looks) and all(look.rows is not None for look in known):
        share = 1 - data.eval.split if isinstance(data.eval, EvalSplitSettings) else 1.0
        weighted = [(source.weight, look) for source, look in zip(train_sources(data), known, strict=True)]
        rows = max(1, round(share * sum(weight * (look.rows or 0) for weight, look in weighted)))
        tokens = max(1, round(share * sum(weight * (look.rows or 0) * look.mean for weight, look in weighted)))
    learned = sum(look.supervised for look in known)
    whole = sum(sum(look.lengths) for look in known)
    return Workload(
        lengths, min(1.0, learned / whole) if whole else 1.0, f"the first rows of each source, {how}", rows, tokens
    )


@dataclass(frozen=True)
class _Look:
    lengths: list[int]
    supervised: int
    rows: int | None

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths) if self.lengths else 0.0


Counter = Any


def _counter(model: ModelSettings) -> tuple[Counter, str]:
    """``texts -> tokens of each``, by the model's tokenizer.json, else by length; and how, in words."""
    where = model.tokenizer if isinstance(model.tokenizer, str) else model.name_or_path
    guess = f"{BYTES_PER_TOKEN:g} bytes taken for a token"
    if (model.tokenizer is None or isinstance(model.tokenizer, str)) and find_spec("tokenizers") is not None:
        try:
            file = find_folder(where, weights=False) / "tokenizer.json"
        except MissingError:
            return _by_bytes, guess
        if file.is_file():
            from tokenizers import Tokenizer

            try:
                tokenizer = Tokenizer.from_file(str(file))
            except Exception:  # noqa: BLE001  the Rust library raises a bare Exception for a file it cannot use
                return _by_bytes, guess
            return lambda texts: [
                len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)
            ], "tokenized"
    return _by_bytes, guess


def _by_bytes(texts: list[str]) -> list[int]:
    return [math.ceil(len(text.encode()) / BYTES_PER_TOKEN) for text in texts]


def _look(source: Source, data: DataSettings, count: Counter, *, as_text: bool) -> _Look | None:
    """Lengths of the first rows; None where they are not on this machine. Raises DataError for a file that is not there."""
    if source.is_hub or is_uri(source.path):
        return None
    files = source.files()
    if any(file.lower().endswith((".json", ".json.gz")) and Path(file).stat().st_size > _WHOLE for file in files):
        return None  # such a file can only be read whole
    try:
        head = [row for row in islice(_rows(files), ROWS + 1) if isinstance(row, RawRow)]
    except ImportError:
        return None
    whole = len(head) <= ROWS
    head = head[:ROWS]
    if not head:
        return None
    lengths, learned = [], 0
    for prompt, answer in _parts(head, source, as_text, count):
        pieces = _fitted(prompt + answer, data, as_text)
        lengths += pieces
        if pieces:
            learned += round(answer * min(1.0, sum(pieces) / max(prompt + answer, 1)))
    total = len(head) if whole else _rows_of(files, head)
    rows = None if total is None else round(total * len(lengths) / len(head))
    return _Look(lengths, learned, rows)


def _rows(files: list[str]) -> Iterator[RawRow | BadRow]:
    for file in files:
        yield from read_file(file)


def _parts(head: list[RawRow], source: Source, as_text: bool, count: Counter) -> Iterator[tuple[int, int]]:
    """Tokens of each row: those that are read, those that are learned."""
    name: str = "text" if as_text else source.format
    if name == "auto":
        name = formats.detect(head, source.columns, source.key)[0]
    convert = formats.convert(name, source.columns)
    samples = [made for made in map(convert, head) if not isinstance(made, BadRow)]
    texts = [_texts(sample) for sample in samples]
    flat = count([text for pair in texts for side in pair for text in side])
    at = 0
    for read, learned in texts:
        sizes = []
        for side in (read, learned):
            markers = 0 if as_text or (len(read) == 0 and len(learned) == 1) else MARKERS
            sizes.append(sum(flat[at : at + len(side)]) + markers * len(side))
            at += len(side)
        yield sizes[0], sizes[1]


def _texts(sample: Sample) -> tuple[list[str], list[str]]:
    if isinstance(sample, Text):
        return [], [sample.text]
    if isinstance(sample, PromptCompletion):
        return [*([sample.system] if sample.system else []), sample.prompt], [sample.completion]
    assert isinstance(sample, Conversation)
    sides: tuple[list[str], list[str]] = ([], [])
    for message in sample.messages:
        sides[message["role"] == "assistant"].append(str(message["content"]))
    return sides


def _fitted(length: int, data: DataSettings, as_text: bool) -> list[int]:
    """A row as ``data.max_length`` leaves it: split, cut, or left out."""
    limit = data.max_length
    if length <= limit:
        return [max(1, length)]
    if as_text:
        return [limit] * (length // limit) + ([length % limit] if length % limit else [])
    return [] if data.on_too_long == "drop" else [limit]


def _rows_of(files: list[str], head: list[RawRow]) -> int | None:
    """Rows of all files, from their size and the size of the rows seen; exact for Parquet."""
    if all(file.lower().endswith(".parquet") for file in files):
        from pyarrow.parquet import ParquetFile

        return sum(int(ParquetFile(file).metadata.num_rows) for file in files)
    if any(file.lower().endswith(".gz") for file in files):
        return None
    first = Path(files[0]).stat().st_size
    seen = sum(len(json.dumps(row.data, ensure_ascii=False).encode()) + 1 for row in head)
    every = sum(Path(file).stat().st_size for file in files)
    mean = seen / len(head) if first >= seen else first / len(head)
    return max(len(head), round(every / mean))
