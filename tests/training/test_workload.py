"""How much a recipe trains on, told from the first rows or from an earlier start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import DataError
from llmkit.recipe import parse
from llmkit.stages import cpt, sft
from llmkit.training import workload as work
from llmkit.training.workload import Workload, passes, sequences, workload


def recipe(model: Path, data: dict[str, Any], **train: Any) -> sft.Recipe:
    return parse({"name": "t", "model": {"name_or_path": str(model)}, "data": data, "train": train}, sft.Recipe)


def rows(path: Path, count: int) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"What is {i:04d}?", "completion": "It is a number."}) + "\n" for i in range(count)
        )
    )
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_rows_of_a_small_file(tmp_path: Path, tiny_llama: Path) -> None:
    from tokenizers import Tokenizer

    found = workload(recipe(tiny_llama, {"train": str(rows(tmp_path / "a.jsonl", 10))}))
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    asked, answered = (len(tokenizer.encode(t).ids) for t in ("What is 0003?", "It is a number."))
    assert found.rows == 10
    assert found.lengths[3] == asked + answered + 2 * work.MARKERS
    assert found.tokens == sum(found.lengths)
    assert found.supervised == pytest.approx((answered + work.MARKERS) / found.mean, rel=0.02)
    assert found.source == "the first rows of each source, tokenized"


def test_the_rows_of_a_large_file_are_estimated_from_its_size(tmp_path: Path, tiny_llama: Path) -> None:
    found = workload(recipe(tiny_llama, {"train": str(rows(tmp_path / "a.jsonl", 5000))}))
    assert len(found.lengths) == work.ROWS
    assert found.rows == pytest.approx(5000, rel=0.01)


def test_weights_and_held_out_rows(tmp_path: Path, tiny_llama: Path) -> None:
    a, b = rows(tmp_path / "a.jsonl", 10), rows(tmp_path / "b.jsonl", 20)
    data = {"train": [{"path": str(a), "weight": 3.0}, str(b)], "eval": {"split": 0.1}}
    assert workload(recipe(tiny_llama, data)).rows == round(0.9 * 50)


def test_without_a_tokenizer_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "doc.txt").write_text("x" * 100)
    given = {
        "name": "t", "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "doc.txt"), "format": "text", "max_length": 10},
    }  # fmt: skip
    found = workload(parse(given, cpt.Recipe))
    assert found.lengths == (10, 10, 5)  # 25 tokens of 4 bytes, split
    assert found.supervised == 1.0
    assert "4 bytes" in found.source


@pytest.mark.parametrize(("what", "kept"), [("drop", 0), ("truncate", 10), ("error", 10)])
def test_rows_that_are_too_long(what: str, kept: int, tmp_path: Path, tiny_llama: Path) -> None:
    data = {"train": str(rows(tmp_path / "a.jsonl", 10)), "max_length": 8, "on_too_long": what}
    found = workload(recipe(tiny_llama, data))
    assert found.lengths == ((8,) * 10 if kept else (8,))
    assert found.rows == (10 if kept else 1)


def test_what_is_not_here_is_taken_to_be_long(tiny_llama: Path) -> None:
    found = workload(recipe(tiny_llama, {"train": "s3://bucket/rows.jsonl", "max_length": 64}))
    assert (found.lengths, found.rows, found.tokens) == ((64,), None, None)
    assert "data.max_length" in found.source


def test_a_file_that_does_not_exist(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        workload(recipe(tiny_llama, {"train": str(tmp_path / "none.jsonl")}))


def test_an_earlier_start_knows_better(tmp_path: Path, tiny_llama: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 10)
    given = recipe(tiny_llama, {"train": str(path), "max_length": 128})
    out = tmp_path / given.output_dir
    out.mkdir(parents=True)
    report = {
        "max_length": 128, "sources": [{"path": str(path)}],
        "train": {
            "rows": 10, "tokens": 400, "supervised_tokens": 100,
            "lengths": {"min": 20.0, "p50": 40.0, "p99": 60.0, "mean": 40.0, "max": 100.0},
        },
    }  # fmt: skip
    (out / "data_report.json").write_text(json.dumps(report))
    found = workload(given)
    assert (found.rows, found.tokens, found.supervised) == (10, 400, 0.25)
    assert (min(found.lengths), max(found.lengths)) == (20, 100)
    assert "earlier start" in found.source
    (out / "data_report.json").write_text(json.dumps(report | {"max_length": 64}))
    assert "earlier" not in workload(given).source


LOAD = Workload((100, 300), 1.0, "test", rows=1000, tokens=200_000)


def test_the_largest_part_of_many_batches(tiny_llama: Path) -> None:
    given = recipe(tiny_llama, {"train": "x.jsonl", "max_length": 512})
    every = passes(given, LOAD, batch=4, part_tokens=0, batches=1000, seq2seq=False)
    assert (every.tokens, every.row, every.parts) == (1200, 300, 1)
    bounded = passes(given, LOAD, batch=4, part_tokens=500, batches=1000, seq2seq=False)
    assert (bounded.tokens, bounded.parts) == (500, 4)  # 300 + 100 + 100; four of 300 each alone
    padded = passes(given, LOAD, batch=4, part_tokens=500, batches=1000, seq2seq=True)
    assert padded.tokens == 2 * 4 * 300


def test_different_shapes_are_counted(tiny_llama: Path) -> None:
    """Rows of 100 and 300 tokens: totals of 128 and 320; blocks of (128, 128), and (128, 128), (128, 256), (64, 320)."""
    given = recipe(tiny_llama, {"train": "x.jsonl", "max_length": 512})
    found = passes(given, LOAD, batch=1, part_tokens=0, batches=100, seq2seq=False)
    assert (found.totals, found.blocks) == (2, 4)


def test_packed_sequences(tiny_llama: Path) -> None:
    given = recipe(tiny_llama, {"train": "x.jsonl", "max_length": 512, "packing": True})
    assert passes(given, LOAD, batch=3, part_tokens=0, batches=5, seq2seq=False).tokens == 3 * 512
    assert sequences(given, LOAD) == 403  # 200,000 / (512 * 0.97)
    assert sequences(given, Workload((1,), 1.0, "test")) is None
