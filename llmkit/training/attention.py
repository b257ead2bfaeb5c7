"""Attention over a flat sequence of several rows, none of which sees another.

The rows of a micro-batch lie end to end in one sequence ``[1, tokens]``, so there is no padding; ``segments`` says how
long each is. transformers hands the keyword ``segments`` down from the model's forward to the attention function
(its AttentionInterface), which is where ours is registered under :data:`NAME`.

On a CPU the scores of a row are computed by batched matrix products and recomputed in the backward pass: forward and
backward together that takes less time than PyTorch's fused CPU kernel for rows of 64 to 256 tokens, and about as much at
512 (``benchmarks/attention.py``). On a GPU PyTorch's own variable-length flash kernel is used where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmkit.training.shapes import rounded_up

NAME = "llmkit_varlen"
QUERY_BLOCK = 128
"""Queries scored at once: bounds the scores held to ``heads * 128 * length`` and skips most of the masked half."""

Segments = tuple[int, ...]


class _RowAttention(torch.autograd.Function):
    """Causal attention inside each segment. q ``[heads, tokens, dim]``; k, v ``[kv_heads, tokens, dim]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int) -> Tensor:
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        q = q * scale  # cheaper than scaling the scores
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(q)
        for block in _blocks(segments, window):
            probs = _probabilities(q, k, block)
            block.put(out, torch.bmm(probs, v[:, block.keys]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        # Keys of a long row collect from several query blocks: summed in float32.
        dk = torch.zeros(k.shape, dtype=torch.float32)
        dv = torch.zeros(v.shape, dtype=torch.float32)
        for block in _blocks(ctx.segments, ctx.window):
            keys = block.keys
            probs = _probabilities(q, k, block)
            grad_rows, q_rows = block.take(grad, k.shape[0], only_real=True), block.take(q, k.shape[0])
            dv[:, keys] += torch.bmm(probs.transpose(1, 2), grad_rows)
            dprobs = torch.bmm(grad_rows, v[:, keys].transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobs, probs, -1, q.dtype)
            block.put(dq, torch.bmm(dscores, k[:, keys]))
            dk[:, keys] += torch.bmm(dscores.transpose(1, 2), q_rows)
        return dq.mul_(ctx.scale), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _Block:
    """Some queries of one segment and the keys that they may see.

    Both are rounded up to ``ROUND`` positions where the sequence is long enough: the matrix library compiles a kernel for
    every shape that it meets, and keeps it. Queries beyond ``real`` belong to the next segment; what is computed for them
    is dropped, and keys ahead of a query are masked anyway.
    """

    __slots__ = ("keys", "offset", "real", "rows", "window")

    def __init__(self, start: int, first: int, last: int, window: int, end: int) -> None:
        lowest = max(0, first - window + 1) if window else 0
        self.real = last - first
        self.rows = slice(start + first, min(start + first + rounded_up(last - first), end))
        self.keys = slice(start + lowest, min(start + lowest + rounded_up(last - lowest), end))
        self.offset = first - lowest
        self.window = window

    def take(self, x: Tensor, kv_heads: int, *, only_real: bool = False) -> Tensor:
        """``[heads, tokens, dim]`` → ``[kv_heads, heads / kv_heads * rows, dim]``: one product a group of query heads."""
        rows = x[:, self.rows]
        if only_real and rows.shape[1] > self.real:
            rows = rows.clone()
            rows[:, self.real :] = 0
        return rows.reshape(kv_heads, -1, x.shape[-1])

    def put(self, out: Tensor, grouped: Tensor) -> None:
        """The inverse of ``take``, for the real rows."""
        rows = grouped.view(out.shape[0], -1, out.shape[-1])
        out[:, self.rows.start : self.rows.start + self.real] = rows[:, : self.real]


def _blocks(segments: Segments, window: int) -> Iterator[_Block]:
    start, end = 0, sum(segments)
    for length in segments:
        for first in range(0, length, QUERY_BLOCK):
            yield _Block(start, first, min(first + QUERY_BLOCK, length), window, end)
        start += length


def _probabilities(q: Tensor, k: Tensor, block: _Block) -> Tensor:
    """Softmax of the masked scores of scaled queries, ``[kv_heads, group * queries, keys]``."""
    queries, keys = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
    scores = torch.bmm(block.take(q, k.shape[0]), k[:, block.keys].transpose(1, 2))
    scores.view(-1, queries, keys).add_(_mask(queries, keys, block.offset, block.window, q.dtype))
    return torch.softmax(scores, -1)


_MASKS: dict[tuple[int, int, int, int, torch.dtype], Tensor] = {}


def _mask(queries: int, keys: int, offset: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, else minus infinity; the first query stands at key ``offset``."""
    shape = (queries, keys, offset, window, dtype)
    found = _MASKS.get(shape)
    if found is None:
        ahead = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + offset)
        hidden = (ahead > 0) | ((ahead <= -window) if window else torch.zeros((), dtype=torch.bool))
        hidden[hidden.all(1)] = False  # only a query that is dropped sees nothing: its softmax must stay finite
        found = torch.zeros(queries, keys, dtype=dtype).masked_fill_(hidden, float("-inf"))
        if len(_MASKS) > 256:
            _MASKS.clear()
        _MASKS[shape] = found
    return found


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int) -> Tensor | None:
    """PyTorch's variable-length flash attention where this build has it; None where it cannot serve this call."""
    varlen = _varlen_kernel()
    if varlen is None or window or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    bounds = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=q.device)
    longest = max(segments)
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0).transpose(0, 1) if group > 1 else x.transpose(0, 1) for x in (k, v))
    out: Tensor = varlen(
        q.transpose(0, 1).contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest,
        window_size=(-1, 0), scale=scale,
    )  # fmt: skip
    return out.transpose(0, 1)


def _varlen_kernel() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel: Any = varlen_attn
    return kernel  # type: ignore[no-any-return]


def _by_rows(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int) -> Tensor:
    """Any device: PyTorch's attention, a row at a time."""
    out, start = [], 0
    for length in segments:
        part = slice(start, start + length)
        mask = _mask(length, length, 0, window, q.dtype).to(q.device) if window and window < length else None
        out.append(
            nn.functional.scaled_dot_product_attention(
                q[None, :, part], k[None, :, part], v[None, :, part], attn_mask=mask, is_causal=mask is None,
                scale=scale, enable_gqa=q.shape[0] != k.shape[0],
            )[0]
        )  # fmt: skip
        start += length
    return torch.cat(out, 1)


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query ``[1, heads, tokens, dim]`` → ``[1, tokens, heads, dim]``.

    Raises:
        ValueError: the model needs soft caps, sinks or dropout in its attention; the trainer's probe meets this first
            and falls back to the attention of transformers.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported or dropout:
        raise ValueError(f"attention over rows does not know {', '.join(unsupported) or 'dropout'}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or 0
    q, k, v = _one_type(query[0], key[0], value[0])
    if q.device.type == "cpu":
        out = _RowAttention.apply(q, k, v, segments, scale, window)  # type: ignore[no-untyped-call]
    else:
        found = _on_gpu(q, k, v, segments, scale, window)
        out = found if found is not None else _by_rows(q, k, v, segments, scale, window)
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def _one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Mixed precision brings queries and keys in float32 and values in bfloat16; kernels want one type."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    return tensors


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows are kept apart by their lengths, not by a mask."""
    return


AttentionInterface.register(NAME, varlen_attention_forward)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def row_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use it while the model trains; generation and export see the model's own."""
    own = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
