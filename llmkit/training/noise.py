"""Noise on the embeddings in training (NEFTune, arXiv 2310.05914), by the length of each row.

transformers has a hook for it, which takes the width of the tensor for the length of a row: with rows end to end in one
sequence the noise would be several times too small, and change with how a batch is divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def noisy_embeddings(model: PreTrainedModel, alpha: float) -> Iterator[None]:
    """While the model trains, add uniform noise of at most ``alpha / sqrt(length * dim)`` to each embedded token.

    ``length`` is that of the token's row: from ``segments`` in a flat sequence, else the padded width.
    """
    segments: tuple[int, ...] | None = None

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal segments
        segments = kwargs.get("segments")

    def add(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        lengths = torch.tensor(segments or [output.shape[1]])
        bound = alpha / torch.sqrt(lengths.float() * output.shape[2])
        largest = bound.repeat_interleave(lengths)[:, None] if segments else bound[:, None]
        return output + torch.empty_like(output).uniform_(-1, 1) * largest.to(output)

    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(add),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
