"""Finding how many sequences fit: the trial leaves nothing behind, the choice is kept, parts can shrink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmkit.errors import MissingError
from llmkit.recipe import parse
from llmkit.stages import sft
from llmkit.training import fit
from llmkit.training.batching import AtOnce, Layout
from llmkit.training.fit import FILE, Chosen, choose_batch, fitting, is_out_of_memory
from llmkit.training.objective import choose
from llmkit.training.trainer import LlmkitTrainer


def recipe(model: Path, **train: Any) -> sft.Recipe:
    given = {
        "name": "t",
        "model": {"name_or_path": str(model)},
        "data": {"train": "x.jsonl", "max_length": 64},
        "train": train,
    }
    return parse(given, sft.Recipe)


def context(folder: Path, notes: list[str], tags: dict[str, str]) -> Any:
    progress, tracker = SimpleNamespace(note=notes.append), SimpleNamespace(tags=tags.update)
    return SimpleNamespace(output_dir=folder, world_size=1, is_main=True, progress=progress, tracker=tracker)


def test_the_choice_is_kept_in_the_folder(tmp_path: Path) -> None:
    assert Chosen.read(tmp_path) is None
    Chosen(4, 2, 1).write(tmp_path)
    assert Chosen.read(tmp_path) == Chosen(4, 2, 1)
    (tmp_path / FILE).write_text('{"batch": 4')
    with pytest.raises(MissingError, match="is damaged"):
        Chosen.read(tmp_path)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: BaseException, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it


def test_a_part_takes_no_more_sequences_than_it_may(make_store: Callable[..., Any]) -> None:
    from llmkit.training.batching import Sequences

    store = make_store([5, 6, 7, 8, 9])
    rows = [Sequences.of(store, packing=False, max_length=64)[i] for i in range(5)]
    layout = Layout(flat=True, part_tokens=0, pad_id=0)
    whole = layout.batch(rows)
    assert len(whole.parts) == 1
    layout.at_once.sequences = 2
    small = layout.batch(whole.sequences)
    assert [part.tokens for part in small.parts] == [11, 15, 9]
    assert (small.tokens, small.supervised, small.rows) == (whole.tokens, whole.supervised, whole.rows)
    assert Layout(flat=True, part_tokens=0, pad_id=0).at_once == AtOnce(0)  # not shared


def test_the_longest_sequences_are_tried(make_store: Callable[..., Any], tiny_llama: Path) -> None:
    store = make_store([5, 60, 7, 50])
    found = fit._longest(recipe(tiny_llama), store, 6)
    assert [sum(len(ids) for _, ids, _ in rows) for rows in found] == [60, 50, 7, 5, 60, 50]
    made_up = fit._longest(recipe(tiny_llama), None, 2)
    assert [len(rows[0][1]) for rows in made_up] == [64, 64]


def test_nothing_stays_of_the_trial(
    make_store: Callable[..., Any],
    tiny_llama: Path,
    load: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    model, store = load(tiny_llama), make_store([20, 30, 40] * 8)
    objective, _ = choose(model, seq2seq=False, own_attention=True, device=torch.device("cpu"))
    layout = Layout(flat=objective.flat, part_tokens=0, pad_id=0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    notes: list[str] = []
    tags: dict[str, str] = {}
    given = recipe(tiny_llama, per_device_train_batch_size="auto", gradient_accumulation_steps=2)
    made = choose_batch(given, context(tmp_path, notes, tags), model, objective, layout, store)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (made.train.per_device_train_batch_size, made.train.gradient_accumulation_steps) == (16, 1)
    assert Chosen.read(tmp_path) == Chosen(16, 1, 16)
    assert "auto is 16 x 1 accumulated" in notes[0]
    assert tags["batch_size.batch"] == "16"


def test_a_limit_left_by_an_earlier_start_holds(tiny_llama: Path, tmp_path: Path) -> None:
    Chosen(8, 1, 2).write(tmp_path)
    layout = Layout(flat=True, part_tokens=0, pad_id=0)
    given = recipe(tiny_llama, per_device_train_batch_size="auto")
    unused: Any = None
    made = choose_batch(given, context(tmp_path, [], {}), unused, unused, layout, None)
    assert (made.train.per_device_train_batch_size, layout.at_once.sequences) == (8, 2)


def test_other_recipes_are_left_alone(tiny_llama: Path) -> None:
    given = recipe(tiny_llama, per_device_train_batch_size=3)
    unused: Any = None
    assert choose_batch(given, unused, unused, unused, unused, None) is given
    assert fitting(given, unused) is LlmkitTrainer
