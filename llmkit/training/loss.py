"""Cross entropy of the next token, computed only where there is something to learn, a chunk of positions at a time.

A vocabulary of 150,000 makes the logits the largest tensor of a training step: 2,048 tokens in float32 take 1.2 GB, and
the usual computation holds three of that size. Here the output layer sees only the supervised positions,
``CHUNK_ELEMENTS`` logits at a time, and the gradient of the hidden states and of the weight is computed in the same
pass, so that nothing of the size of the logits outlives a chunk (the idea of Liger's fused linear cross entropy,
arXiv 2410.10989, in plain PyTorch and for any device).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.training.shapes import ROUND, rounded_up

CHUNK_ELEMENTS = 1 << 23
"""Logits held at once: 32 MB in float32."""

CHUNK_ROWS = 256
"""Positions a chunk where the output layer is more than a linear one."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over positions of ``-log softmax(hidden @ weight.T + bias)[target]``.

    hidden ``[n, dim]``, weight ``[vocabulary, dim]``, bias ``[vocabulary]`` or None, target ``[n]``; the softmax and
    the sum are in float32. Both gradients are ready after the forward pass and scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight) if need_weight else None
        dbias = torch.zeros_like(bias) if bias is not None and need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            h, y = _rounded(hidden[part]), target[part, None]
            real = y.shape[0]
            logits = nn.functional.linear(h, weight, bias)
            probs = torch.softmax(logits, -1, dtype=torch.float32)
            total -= probs[:real].gather(1, y).clamp_min(1e-38).log_().sum()
            grad = logits.copy_(probs)  # reuses the logits' memory, in their type
            grad[:real].scatter_add_(1, y, torch.full_like(y, -1, dtype=grad.dtype))
            grad[real:] = 0
            if dhidden is not None:
                dhidden[part] = torch.mm(grad, weight)[:real]
            if dweight is not None:
                dweight.addmm_(grad.t(), h)
            if dbias is not None:
                dbias += grad.sum(0)
        ctx.save_for_backward(dhidden, dweight, dbias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return (*(x.mul_(grad) if x is not None else None for x in ctx.saved_tensors), None)


def chunk_rows(vocabulary: int) -> int:
    """Positions a chunk: a multiple of ``ROUND``, so that the matrix library meets few shapes (see shapes.py)."""
    return max(ROUND, CHUNK_ELEMENTS // vocabulary // ROUND * ROUND)


def _rounded(hidden: Tensor) -> Tensor:
    """Rows of zeros added up to a multiple of ``ROUND``."""
    return nn.functional.pad(hidden, (0, 0, 0, rounded_up(hidden.shape[0]) - hidden.shape[0]))


def linear_cross_entropy(
    hidden: Tensor, head: nn.Module, target: Tensor, apply: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Summed loss, a float32 scalar, of ``head`` applied to ``hidden [n, dim]`` against ``target [n]``.

    A plain linear layer takes the fused path; any other (an adapter on the output layer, say) is run chunk by chunk
    through ``apply`` (default: the layer itself) and recomputed in the backward pass.
    """
    if type(head) is nn.Linear:
        kind = hidden.device.type
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if torch.is_autocast_enabled(kind):  # mixed precision: the products' type, which the backward pass keeps
            lower = torch.get_autocast_dtype(kind)
            hidden, weight, bias = hidden.to(lower), weight.to(lower), bias.to(lower) if bias is not None else None
        with torch.autocast(kind, enabled=False):
            loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, target)  # type: ignore[no-untyped-call]
        return loss
    return _chunked(hidden, apply or head, target)


def _chunked(hidden: Tensor, head: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    def part(h: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(h).float(), y, reduction="sum")

    if not hidden.shape[0]:
        return head(hidden).float().sum()  # 0, and a gradient for every parameter: other ranks wait for it
    losses = [
        checkpoint(part, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(CHUNK_ROWS), target.split(CHUNK_ROWS), strict=True)
    ]
    return torch.stack(losses).sum()
