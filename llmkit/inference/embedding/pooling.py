"""One vector out of the states of a row's tokens: sentence-transformers' pooling modes, on rows without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("cls", "mean", "last", "max", "mean_sqrt_len", "weighted_mean")


def pool(hidden: Tensor, modes: Sequence[str], *, shared: Tensor | None = None, skip: int = 0) -> Tensor:
    """States ``[rows, length, dim]`` of rows of one length to vectors ``[rows, len(modes) * dim]``, in float32.

    ``shared`` ``[tokens, dim]`` are the states of a beginning that the rows have in common and that ``hidden`` does not
    hold. ``skip`` tokens at the beginning, a prompt's, do not count. As in sentence-transformers, ``weighted_mean``
    weighs a token by its position from 1 (the prompt's tokens included), and a row of prompt alone is not emptied.
    """
    before = 0 if shared is None else shared.shape[0]
    total = before + hidden.shape[1]
    skip = min(skip, total - 1)
    own = hidden[:, max(0, skip - before) :].float()
    common = None if shared is None or skip >= before else shared[skip:].float()
    return torch.cat([_one(mode, own, common, skip, total) for mode in modes], -1)


def _one(mode: str, own: Tensor, common: Tensor | None, skip: int, total: int) -> Tensor:
    if mode == "last":
        return own[:, -1]
    if mode == "cls":
        return own[:, 0] if common is None else common[0].expand(own.shape[0], -1)
    if mode == "max":
        highest = own.amax(1)
        return highest if common is None else torch.maximum(highest, common.amax(0))
    if mode == "weighted_mean":
        weights = torch.arange(skip + 1, total + 1, device=own.device, dtype=torch.float32)
        first = total - skip - own.shape[1]
        summed = torch.einsum("t,rtd->rd", weights[first:], own)
        if common is not None:
            summed = summed + weights[:first] @ common
        return summed / weights.sum()
    summed = own.sum(1) if common is None else own.sum(1) + common.sum(0)
    count = float(total - skip)
    return summed / (count if mode == "mean" else count**0.5)
