"""The steps behind the pooling of a sentence-transformers folder: dense layers, layer norms, unit length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmkit.errors import MissingError, UsageError
from llmkit.inference.embedding.folder import Module

Head = Callable[[Tensor], Tensor]


class _Dense(nn.Module):
    """``activation(W x + b)``, with a residual where the folder says so."""

    def __init__(self, weights: dict[str, Tensor], activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.weight, self.bias = weights["linear.weight"].float(), weights.get("linear.bias")
        self.bias = None if self.bias is None else self.bias.float()
        self.around = weights["residual.weight"].float() if "residual.weight" in weights else None
        self.activation, self.residual = activation, residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(nn.functional.linear(x, self.weight.to(x.device), _on(self.bias, x)))
        if not self.residual:
            return out
        return out + (x if self.around is None else nn.functional.linear(x, self.around.to(x.device)))


def heads(modules: Sequence[Module]) -> list[Head]:
    """One function of vectors ``[rows, dim]`` for each module, but for unit length, which the output settings decide.

    Raises MissingError for damaged weights, UsageError for an activation that is not one of torch.
    """
    return [_dense(module) if module.kind == "dense" else _norm(module) for module in modules if module.kind in _KINDS]


_KINDS = ("dense", "layer_norm")


def _dense(module: Module) -> Head:
    weights = _weights(module.folder)
    if "linear.weight" not in weights:
        raise MissingError(f"{module.folder} has no linear.weight: its weights are not those of a Dense module")
    name = str(module.config.get("activation_function") or "torch.nn.modules.linear.Identity")
    kind = getattr(nn, name.rpartition(".")[2], None)
    if not name.startswith("torch.nn.") or not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(f"{module.folder}: llmkit does not know the activation {name}")
    return _Dense(weights, kind(), bool(module.config.get("use_residual")))


def _norm(module: Module) -> Head:
    weights = {name.rpartition(".")[2]: value.float() for name, value in _weights(module.folder).items()}
    if not {"weight", "bias"} <= set(weights):
        raise MissingError(f"{module.folder} has no weight and bias: its weights are not those of a LayerNorm module")
    weight, bias = weights["weight"], weights["bias"]

    def norm(x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, weight.shape, _on(weight, x), _on(bias, x))

    return norm


def _weights(folder: Path) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    try:
        if file.is_file():
            from safetensors.torch import load_file

            return load_file(file)
        found: dict[str, Tensor] = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip have exceptions of their own
        raise MissingError(f"The weights in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    return found


def _on(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.device)
