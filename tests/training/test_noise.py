"""NEFTune's noise is as large as each row's length says, however rows are laid out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.training.noise import noisy_embeddings

Load = Callable[..., Any]


def embedded(model: Any, **inputs: Any) -> Tensor:
    """What the embedding hands to the first layer in a forward pass."""
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    model(**inputs, use_cache=False)
    handle.remove()
    return seen[0]


IDS = torch.randint(0, 300, (1, 120), generator=torch.Generator().manual_seed(0))
SEGMENTS = (4, 16, 100)


def test_a_flat_sequence_gets_the_noise_of_its_rows(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama).train()
    positions = torch.cat([torch.arange(n) for n in SEGMENTS])[None]
    clean = embedded(model, input_ids=IDS, position_ids=positions, segments=SEGMENTS)
    with noisy_embeddings(model, 5.0):
        noise = embedded(model, input_ids=IDS, position_ids=positions, segments=SEGMENTS) - clean
    for part, length in zip(noise.split(SEGMENTS, 1), SEGMENTS, strict=True):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.9 * bound < float(part.abs().max()) <= bound * 1.0001
        assert float(part.mean()) == pytest.approx(0, abs=0.1 * bound)
        assert float(part.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_padded_batch_gets_that_of_its_width(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama).train()
    ids = IDS.view(4, 30)
    clean = embedded(model, input_ids=ids)
    with noisy_embeddings(model, 5.0):
        noise = embedded(model, input_ids=ids) - clean
    bound = 5.0 / (30 * 64) ** 0.5
    assert 0.95 * bound < float(noise.abs().max()) <= bound * 1.0001


def test_no_noise_in_evaluation_and_afterwards(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama)
    clean = embedded(model, input_ids=IDS)
    with noisy_embeddings(model, 5.0):
        assert torch.equal(embedded(model, input_ids=IDS), clean)
    assert torch.equal(embedded(model.train(), input_ids=IDS), clean)
