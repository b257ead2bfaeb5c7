"""The bytes that a layer keeps for its backward pass, as counted by torch itself, against the arithmetic of the plan."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from llmkit.modeling.adapters import attach
from llmkit.modeling.architecture import Architecture, Tensor
from llmkit.modeling.memory import Setup, layer_activations
from llmkit.modeling.settings import AdapterSettings
from llmkit.training.attention import row_attention
from llmkit.training.batching import Layout
from llmkit.training.kernels import lean_layers
from llmkit.training.lora_layer import lean_adapters

TOKENS = 64
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip


def kept(kind: Any, layers: int, dtype: torch.dtype, adapter: AdapterSettings | None, mixed: bool) -> int:
    """Bytes of all tensors that autograd keeps after a forward pass over 64 tokens, weights left out."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(kind(**SIZES, num_hidden_layers=layers), dtype=dtype)
    if adapter is not None:
        model = attach(model, adapter, seed=0)
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = ("r", np.arange(TOKENS, dtype=np.int32), np.arange(TOKENS, dtype=np.int32))
    (part,) = Layout(flat=True, part_tokens=0, pad_id=0).batch([[row]]).parts
    bare = model.get_base_model() if adapter is not None else model
    with ExitStack() as stack:
        stack.enter_context(row_attention(bare))
        stack.enter_context(lean_layers(model))
        stack.enter_context(lean_adapters(model))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=mixed))
        out = model(**part.inputs, use_cache=False).logits
    assert out.requires_grad
    return sum(found.values())


def architecture(kind: Any) -> Architecture:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**SIZES, num_hidden_layers=2))
    tensors = tuple(Tensor(n, tuple(p.shape)) for n, p in model.named_parameters())
    qk_norm = any("q_norm" in t.name for t in tensors)
    return Architecture("llama", 32, 2, 4, 2, 8, 80, 128, tensors, "test", qk_norm=qk_norm)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize(
    ("dtype", "mixed", "adapter"),
    [
        ("float32", False, None),
        ("bfloat16", False, None),
        ("float32", True, None),
        ("bfloat16", False, AdapterSettings(r=4)),
        ("bfloat16", False, AdapterSettings(r=4, target_modules=["q_proj", "v_proj"])),
        ("bfloat16", False, AdapterSettings(r=4, lora_dropout=0.1)),
    ],
)
def test_a_layer_keeps_what_the_plan_says(kind: Any, dtype: str, mixed: bool, adapter: AdapterSettings | None) -> None:
    setup = Setup(
        architecture(kind), cpu=True, dtype=dtype, part_tokens=TOKENS, row_tokens=TOKENS, adapter=adapter,
        mixed="bfloat16" if mixed else "",
    )  # fmt: skip
    two, four = (kept(kind, layers, getattr(torch, dtype), adapter, mixed) for layers in (2, 4))
    measured = (four - two) / 2
    if mixed:  # copies of the weights in the lower type, which the plan counts as working space
        measured -= 2 * sum(t.count for t in setup.architecture.linears) / 2
    elif adapter is not None:  # the adapter's weights in the layers' type
        measured -= 2 * sum(adapter.r * sum(t.shape) for t in setup.architecture.linears if _has(t, adapter)) / 2
    assert measured / TOKENS == pytest.approx(layer_activations(setup), rel=0.01)


def _has(tensor: Tensor, adapter: AdapterSettings) -> bool:
    return adapter.target_modules == "all-linear" or any(name in tensor.name for name in adapter.target_modules)
