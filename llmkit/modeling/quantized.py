"""Frozen weights in 4 or 8 bits under an adapter: QLoRA (arXiv 2305.14314), LLM.int8's storage (arXiv 2208.07339).

bitsandbytes quantizes and dequantizes; the product is ours: dequantize, multiply, forget, in each direction, in training and in
evaluation alike. Its own layers do something else in each. On a CPU with AVX512-bf16 a 4-bit layer that is asked in
evaluation mode rewrites its weights into another layout for good, from which its backward pass, saving and merging read
garbage (bitsandbytes 0.50, ``Linear4bit.forward``). An 8-bit layer rounds its input as well, by scales that depend on
the rows beside, differently in training on a CPU. See docs/decisions/quantized-products.md.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.errors import MissingError
from llmkit.modeling.locate import weight_files
from llmkit.modeling.settings import QuantizationSettings


class _Product(torch.autograd.Function):
    """x ``[..., in]`` times the transposed weight of a quantized layer ``[out, in]`` → ``[..., out]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, dequantized(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grads
        return torch.matmul(grad, dequantized(ctx.layer, grad.dtype)), None


class QuantizedLinear(nn.Module):
    """What a layer of bitsandbytes becomes: the same weight, and a product without surprises."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x.to(product_dtype(self, x.dtype)), self)  # type: ignore[no-untyped-call]
        bias: Any = self.bias
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)


def check_installed() -> None:
    """Raises MissingError without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise MissingError.extra("bitsandbytes", "quantize")


def loading_arguments(quantization: QuantizationSettings, device: str | int) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize each weight as it is read; the whole model never lies there."""
    from transformers import BitsAndBytesConfig

    if quantization.type == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        )
    return {"quantization_config": config, "device_map": {"": device}}


def use_own_product(model: nn.Module) -> int:
    """Turn every layer of bitsandbytes in ``model`` into a :class:`QuantizedLinear`; gives their number."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    found: list[Any] = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    for module in found:
        module.__class__ = _own(type(module))  # type: ignore[arg-type]  # a class can be hashed
    return len(found)


@cache
def _own(kind: type) -> type:
    """``kind`` with our forward; PEFT knows the layers by their class, so it stays one of its kind and name."""
    return type(kind.__name__, (QuantizedLinear, kind), {"__module__": __name__})


def dequantized(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` of a linear layer as ``dtype``; of an ordinary one, itself where it is that already."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(weight.data, state)
        return found.to(dtype)
    if weight.dtype == torch.int8:
        scale: Tensor = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float().mul_(scale.unsqueeze(1) / 127.0).to(dtype)  # type: ignore[no-any-return]
    return weight.to(dtype)  # type: ignore[no-any-return]


def product_dtype(layer: Any, given: torch.dtype) -> torch.dtype:
    """Type in which a layer multiplies an input of type ``given``."""
    return getattr(layer, "compute_dtype", None) or (given if is_quantized(layer) else layer.weight.dtype)


def is_quantized(layer: Any) -> bool:
    """Is this a linear layer with a quantized weight?"""
    return isinstance(layer, QuantizedLinear)


def weights_of(parameter: Tensor) -> int:
    """Weights in a parameter; two lie in a byte of a 4-bit one, and one divided by ZeRO-3 says how many there are."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def memory_of(model: nn.Module) -> int:
    """Bytes of all weights of ``model``, scales of quantized ones included."""
    return sum(p.numel() * p.element_size() + _scales(p) for p in model.parameters())


def _scales(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    tensors = (
        [getattr(parameter, "SCB", None)] if state is None else [state.absmax, getattr(state.state2, "absmax", None)]
    )
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def describe(model: nn.Module, quantization: QuantizationSettings) -> str:
    """How much of ``model`` is quantized, for the reader."""
    inside: list[Any] = [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)]
    few_bits = sum(weights_of(weight) for weight in inside)
    whole = sum(weights_of(parameter) for parameter in model.parameters())
    return (
        f"{few_bits:,} of {whole:,} weights are kept in {quantization.type}, the rest (embeddings, output layer, norms) as they"
        f" are: {memory_of(model) / 1e6:,.0f} MB"
    )


def check_saved_finite(folder: Path) -> None:
    """Raises MissingError naming weights in ``folder`` that hold NaN or infinity: quantizing would hide them."""
    bad = [name for name, tensor in _saved(folder) if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise MissingError(
            f"{folder} holds weights that are not finite (NaN or infinity): {', '.join(bad[:4])}. "
            "Such a model is damaged; take another copy or an earlier checkpoint"
        )


def _saved(folder: Path) -> Any:
    """Names and tensors of a folder's weight files, one at a time."""
    from safetensors import safe_open

    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  not a dict
                    yield name, opened.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
