"""A frozen linear layer and its LoRA update in one forward and one backward pass.

``y = x W' + b + scale * dropout(x) A' B'`` (arXiv 2106.09685, eq. 3). PEFT computes the update beside the layer: the
product, its scaling and the sum are passes over an activation each, and so are their gradients. Here the update is added
by the matrix product itself, forward and backward; kept are the input (which the layers of a block share), the rank-r
product and, with dropout, its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from llmkit.modeling.quantized import dequantized, is_quantized, product_dtype


class _LoraLinear(torch.autograd.Function):
    """x ``[..., in]``, weight ``[out, in]`` frozen, a ``[r, in]`` and b ``[out, r]`` of any float type → ``[..., out]``.

    A quantized weight is given as a function that makes it: it is asked anew in the backward pass, and nothing is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        given: Tensor | Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
    ) -> Tensor:
        a_used, b_used = a.to(x.dtype), b.to(x.dtype)
        mask = kept_mask(x, p) if p else None
        dropped = x if mask is None else _keep(x, mask)
        scale /= 1 - p  # what dropout keeps is scaled up: here, as the update's scale, for nothing
        inner = functional.linear(dropped, a_used).flatten(0, -2)
        kept = given if isinstance(given, Tensor) else None
        out = functional.linear(x, given() if kept is None else kept, bias)  # type: ignore[operator]
        out.view(-1, out.shape[-1]).addmm_(inner, b_used.t(), alpha=scale)
        ctx.save_for_backward(x, mask, inner, kept, a_used, b_used)
        ctx.scale, ctx.types, ctx.given = scale, (a.dtype, b.dtype), given if kept is None else None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, inner, weight, a, b = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        dinner = torch.mm(grad, b).mul_(ctx.scale)
        dropped = x if mask is None else _keep(x, mask)
        da = torch.mm(dinner.t(), dropped.flatten(0, -2)).to(ctx.types[0])
        db = torch.mm(grad.t(), inner).mul_(ctx.scale).to(ctx.types[1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(grad, ctx.given() if weight is None else weight)
            if mask is None:
                dx.addmm_(dinner, a)
            else:
                dx += _keep(torch.mm(dinner, a), mask.flatten(0, -2))
            dx = dx.view_as(x)
        return dx, None, None, da, db, None, None


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept_mask(x: Tensor, p: float) -> Tensor:
    """Integers as wide as the elements of ``x``: all bits set, or none with probability ``p`` (to 1/65,536).

    From PyTorch's default generator. On a CPU its own dropout draws a number for each element, one after the other, and
    multiplies by booleans, which together take longer than the layer's products: here one 64-bit draw serves four
    elements, and the mask is applied to the bits.
    """
    kind = _INTEGERS[x.element_size()]
    if x.device.type != "cpu":
        return (torch.rand_like(x, dtype=torch.float32) >= p).to(kind).neg_()
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    sixteen = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.ge(sixteen, round(p * 65_536) - 32_768, out=torch.empty(x.shape, dtype=kind)).neg_()


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask is set, else 0."""
    return (x.contiguous().view(mask.dtype) & mask).view(x.dtype)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layer: nn.Linear = self.base_layer
    same_type = x.dtype == product_dtype(layer, x.dtype)
    plain = not args and not kwargs and same_type and not torch.is_autocast_enabled(x.device.type)
    if not plain or self.merged or self.disable_adapters:
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    (name,) = self.active_adapters
    p = float(getattr(self.lora_dropout[name], "p", 0.0)) if self.training else 0.0
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    weight = partial(dequantized, layer, x.dtype) if is_quantized(layer) else layer.weight
    return _LoraLinear.apply(x, weight, layer.bias, a, b, float(self.scaling[name]), p)  # type: ignore[no-untyped-call,no-any-return]


def _is_plain(module: nn.Module) -> bool:
    """One LoRA update without further inventions on a frozen linear layer, quantized or not."""
    if not isinstance(module, LoraLayer):
        return False
    base: Any = module.base_layer
    kind: type = type(module)
    ordinary = kind is LoraLinear and type(base) is nn.Linear
    if not (ordinary or (is_quantized(base) and kind.__name__ == type(base).__name__)):
        return False
    names: list[str] = list(module.active_adapters)
    return (
        len(names) == 1
        and names[0] in module.lora_A
        and names[0] not in module.lora_variant
        and not module.lora_bias.get(names[0], False)
        and not module.fan_in_fan_out
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and type(module.lora_dropout[names[0]]) in (nn.Identity, nn.Dropout)
    )


@contextmanager
def lean_adapters(model: nn.Module) -> Iterator[int]:
    """Replace the forward of plain LoRA layers while the model trains; yields how many."""
    replaced: list[nn.Module] = [m for m in model.modules() if _is_plain(m) and "forward" not in m.__dict__]
    forward: Callable[..., Tensor] = _forward
    for module in replaced:
        module.forward = MethodType(forward, module)
    try:
        yield len(replaced)
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)
