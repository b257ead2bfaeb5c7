"""Faster, leaner forward and backward passes for the layers that most decoders share, on the CPU.

In eager mode the small operations around the matrix products (norms, gates, rotations) are many passes over memory, and
each keeps its own copies for the backward pass. The functions here do the same arithmetic in fewer
passes and keep only their inputs. A layer is replaced only after it was compared with its replacement, forward and
backward, on random input: what is not the same is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Forward = Callable[..., Any]


class _RMSNorm(torch.autograd.Function):
    """``x / rms(x) * weight`` over the last dimension (arXiv 1910.07467), statistics in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = x.float()
        inverse = torch.linalg.vecdot(normed, normed).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        # x.float() is x itself where x is float32 already: it must not be written to.
        normed = normed.mul(inverse) if normed is x else normed.mul_(inverse)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        dweight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dnormed = grad.float() * weight
        along = torch.linalg.vecdot(dnormed, normed).div_(x.shape[-1]).unsqueeze(-1)
        return dnormed.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), dweight, None


class _GatedSiLU(torch.autograd.Function):
    """``silu(gate) * up`` (arXiv 2002.05202), the activation recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        dup = functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), dup


class _Rotary(torch.autograd.Function):
    """Rotary position embedding (arXiv 2104.09864) of queries and keys in the half-split layout."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin, 1), _rotate(k, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), _rotate(grads[1], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x ``[batch, heads, tokens, dim]``; a negative sign turns back, which is the gradient."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # statistics stay in float32 in mixed precision too
        out: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(_GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]
    return out


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    turned: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))  # type: ignore[no-untyped-call]
    return turned


def _replacement(module: nn.Module) -> Forward | None:
    if hasattr(module, "variance_epsilon") and isinstance(getattr(module, "weight", None), nn.Parameter):
        return _norm_forward
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return _mlp_forward
    return None


def _width(module: Any) -> int:
    return int(module.weight.shape[-1] if hasattr(module, "variance_epsilon") else module.gate_proj.in_features)


def _input_dtype(module: nn.Module, usual: torch.dtype) -> torch.dtype:
    """That of its first weight; of the ``usual`` type where it is quantized."""
    first = next(module.parameters()).dtype
    return first if first.is_floating_point else usual


def _same(module: nn.Module, new: Forward, dtype: torch.dtype) -> bool:
    """Forward and input gradient of both on the same random input of type ``dtype`` agree within rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, _width(module), generator=generator).to(dtype)
    # Any direction but the squares: those of a norm with weights of 1 always add up to the same.
    toward = torch.randn(x.shape, generator=generator)
    outcomes = []
    was_training = module.training
    module.eval()  # an adapter's dropout would make every two passes differ
    gate: Any = getattr(module, "gate_proj", None)
    if gate is not None:
        with torch.no_grad():  # near zero all activations look alike
            x = x / gate(x).std().clamp_min(1e-6)
    for forward in (module.forward, MethodType(new, module)):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        outcomes += [out.detach(), torch.autograd.grad((out.float() * toward).sum(), leaf)[0]]
    module.train(was_training)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    return all(_near(a, b, tolerance) for a, b in zip(outcomes[:2], outcomes[2:], strict=True))


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm().clamp_min(1e-6))


def _same_rotary(old: Forward) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 4, 8, generator=generator) for heads in (2, 1))
    angle = torch.randn(1, 4, 4, generator=generator).repeat(1, 1, 2)
    try:
        theirs = old(q, k, angle.cos(), angle.sin())
    except (TypeError, ValueError, RuntimeError):
        return False
    return all(_near(a, b, 1e-5) for a, b in zip(_rotary(q, k, angle.cos(), angle.sin()), theirs, strict=True))


@contextmanager
def lean_layers(model: nn.Module) -> Iterator[int]:
    """Replace what can be replaced while the model trains on a CPU; yields how many layers were."""
    restore: list[Callable[[], None]] = []
    verdicts: dict[tuple[type, torch.dtype, bool], bool] = {}
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        for module in model.modules():
            new = _replacement(module)
            if new is None or "forward" in module.__dict__:
                continue
            dtype = _input_dtype(module, usual)
            key = (type(module), dtype, next(module.parameters()).device.type == "cpu")
            if key not in verdicts:
                verdicts[key] = key[2] and _same(module, new, dtype)
            if verdicts[key]:
                module.forward = MethodType(new, module)
                restore.append(_forget(module))
        for library in {sys.modules[type(m).__module__] for m in model.modules()}:
            old = getattr(library, "apply_rotary_pos_emb", None)
            if old is not None and next(model.parameters()).device.type == "cpu" and _same_rotary(old):
                library.apply_rotary_pos_emb = _rotary  # type: ignore[attr-defined]
                restore.append(_put_back(library, old))
        yield len(restore)
    finally:
        for undo in restore:
            undo()


def _forget(module: nn.Module) -> Callable[[], None]:
    return lambda: module.__dict__.pop("forward", None)


def _put_back(library: Any, old: Forward) -> Callable[[], None]:
    return lambda: setattr(library, "apply_rotary_pos_emb", old)
