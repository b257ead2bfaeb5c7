"""Attention inside the rows of a flat batch, which has no padding: encoders and decoders alike, for inference only.

The rows of a batch lie end to end in one sequence ``[1, tokens]``, sorted by length, so that rows of one length are
neighbours: such a group is a view ``[rows, length, …]`` of the sequence, and one call attends in all its rows.
transformers hands the keyword ``layout`` down from the model's forward to the attention function (its
AttentionInterface). A causal model may have the keys and values of a beginning that all rows share in ``layout``.

Short rows are multiplied as one batch of small matrices: for up to 24 tokens that took a fifth of the time of PyTorch's
fused CPU kernel (MiniLM's heads, two cores with AVX2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "llmkit_flat"
SHORT = 24
"""Up to so many tokens a row's scores are computed by plain batched products."""
FUSED = 512
"""From so many keys on a causal row takes the kernel that skips the masked half."""

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Group:
    """``rows`` rows of ``length`` tokens each, end to end from position ``start`` of the flat sequence."""

    start: int
    rows: int
    length: int

    @property
    def part(self) -> slice:
        return slice(self.start, self.start + self.rows * self.length)


@dataclass(frozen=True)
class Layout:
    """Where the rows of a flat sequence are. ``prefix`` holds keys and values ``[tokens, heads, dim]`` of every layer for
    a shared beginning; ``keep`` is filled with those of this forward, for later ones to begin with.
    """

    groups: tuple[Group, ...]
    prefix: dict[int, KeysValues] = field(default_factory=dict)
    keep: dict[int, KeysValues] | None = None


def groups_of(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Neighbouring rows of one length as a group each."""
    found: list[Group] = []
    start = 0
    for length in lengths:
        last = found[-1] if found else None
        if last is not None and last.length == length:
            found[-1] = Group(last.start, last.rows + 1, length)
        else:
            found.append(Group(start, 1, length))
        start += length
    return tuple(found)


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query ``[1, heads, tokens, dim]`` → ``[1, tokens, heads, dim]``.

    Without ``layout`` it is transformers' own. Raises ValueError for a model whose attention wants more than this does
    (soft caps, sinks, position biases): the probe at loading meets it, and the model gets padded batches.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"attention over flat rows does not know {', '.join(unsupported)}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: Any = getattr(module, "layer_idx", None)
    if layout.keep is not None:
        layout.keep[layer] = (k.clone(), v.clone())
    before = layout.prefix[layer] if layout.prefix else None
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for group in layout.groups:
        rows, length = group.rows, group.length
        parts = [x[group.part].unflatten(0, (rows, length)).transpose(1, 2) for x in (q, k, v)]
        attended = _attend(parts[0], parts[1], parts[2], before, scale, causal)
        out[group.part].view(rows, length, *out.shape[1:]).copy_(attended.transpose(1, 2))
    return out.unsqueeze(0), None


def _attend(q: Tensor, k: Tensor, v: Tensor, before: KeysValues | None, scale: float, causal: bool) -> Tensor:
    """Attention in rows of one length: q ``[rows, heads, length, dim]``, k and v with their own number of heads."""
    rows, heads, length = q.shape[:3]
    if before is not None:
        k, v = (
            torch.cat([shared.transpose(0, 1).expand(rows, -1, -1, -1), own], 2)
            for shared, own in zip(before, (k, v), strict=True)
        )
    grouped = heads // k.shape[1]
    small = q.device.type == "cpu" and length <= SHORT
    if not causal:
        if small:
            return _products(q, k, v, None, scale)
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped > 1)
    if before is None and length >= FUSED:
        return scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=grouped > 1)
    mask = _causal_mask(length, k.shape[2], grouped, q)
    # The query heads that share keys lie one behind the other, as if they were more queries.
    folded = q.reshape(rows, k.shape[1], grouped * length, q.shape[3])
    attended = _products(folded, k, v, mask, scale) if small else scaled_dot_product_attention(
        folded, k, v, attn_mask=mask, scale=scale
    )  # fmt: skip
    return attended.reshape(rows, heads, length, v.shape[3])


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax of the scores times the values, as two batched matrix products."""
    rows, heads = k.shape[:2]
    flat_q, flat_k, flat_v = (x.reshape(rows * heads, x.shape[2], x.shape[3]) for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1) if mask is None else mask
    scores = torch.baddbmm(bias, flat_q, flat_k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), flat_v).view(rows, heads, q.shape[2], v.shape[3])


def _causal_mask(queries: int, keys: int, copies: int, like: Tensor) -> Tensor:
    """``[copies * queries, keys]``: 0 where a query may look, else minus infinity; the last query sees every key."""
    mask = torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(keys - queries + 1).repeat(copies, 1)


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows are kept apart by the layout, not by a mask."""
    return


AttentionInterface.register(NAME, flat_attention)
AttentionMaskInterface.register(NAME, _no_mask)
