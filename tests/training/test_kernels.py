"""The lean layers do what the layers do that they replace, and go away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit.training.kernels import _GatedSiLU, _RMSNorm, _rotary, lean_layers

TIGHT, LOOSE = 1e-5, 3e-2


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach().float(), b.detach().float()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * (b.norm() + 1e-3))


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # not all ones
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


IDS = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_give_the_same_logits_and_gradients(
    kind: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    model = model_of(request.getfixturevalue(kind), dtype)
    plain = gradients(model, IDS)
    with lean_layers(model) as replaced:
        # norms (Qwen has two more a layer), gates and the rotation
        assert replaced == {"tiny_llama": 5, "tiny_qwen": 9}[kind] + 2 + 1
        lean = gradients(model, IDS)
    tolerance = TIGHT if dtype == torch.float32 else 0.1
    assert near(lean[0], plain[0], tolerance)
    assert lean[1].keys() == plain[1].keys()
    for name in plain[1]:
        assert near(lean[1][name], plain[1][name], tolerance), name
    again = gradients(model, IDS)
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][name], plain[1][name]) for name in plain[1])


def test_everything_is_put_back_after_an_error(tiny_llama: Path) -> None:
    from transformers.models.llama import modeling_llama

    model = model_of(tiny_llama)
    own = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(RuntimeError, match="in between"), lean_layers(model):
        assert modeling_llama.apply_rotary_pos_emb is not own
        raise RuntimeError("in between")
    assert modeling_llama.apply_rotary_pos_emb is own
    assert not [m for m in model.modules() if "forward" in m.__dict__]


def test_frozen_weights_get_no_gradient(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    plain = gradients(model, IDS)
    with lean_layers(model) as replaced:
        assert replaced == 8
        lean = gradients(model, IDS)
    assert list(lean[1]) == ["model.embed_tokens.weight"]
    assert near(lean[1]["model.embed_tokens.weight"], plain[1]["model.embed_tokens.weight"], TIGHT)


def test_an_adapter_with_dropout_has_its_layers_replaced_too(tiny_llama: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(model_of(tiny_llama), config).train()
    state = torch.get_rng_state()
    with lean_layers(model) as replaced:
        assert replaced == 8
    assert torch.equal(torch.get_rng_state(), state), "the comparison used up random numbers of the run"
    assert model.training and all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_around_quantized_weights_are_replaced_too(kind: str, tiny_llama: Path) -> None:
    from llmkit.modeling.adapters import attach
    from llmkit.modeling.load import open_model
    from llmkit.modeling.settings import AdapterSettings, QuantizationSettings

    base = open_model(tiny_llama, dtype="bfloat16", quantization=QuantizationSettings(type=kind))  # type: ignore[arg-type]
    model = attach(base, AdapterSettings(r=4), seed=0)
    plain = gradients(model, IDS)
    with lean_layers(model) as replaced:
        assert replaced == 5 + 2 + 1
        lean = gradients(model, IDS)
    assert near(lean[0], plain[0], LOOSE)


def test_mixed_precision_keeps_statistics_in_float32(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    norm = model.model.norm
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)) * 3
    with torch.autocast("cpu", torch.bfloat16), lean_layers(model):
        assert near(norm(x), norm.forward.__self__.__class__.forward(norm, x), TIGHT)


@contextmanager
def changed(model: Any, act: nn.Module) -> Iterator[Any]:
    for layer in model.model.layers:
        layer.mlp.act_fn = act
    yield model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Tanh(), nn.Hardswish()], ids=lambda a: type(a).__name__)
def test_another_activation_is_left_alone(dtype: torch.dtype, act: nn.Module, tiny_llama: Path) -> None:
    with changed(model_of(tiny_llama, dtype), act) as model, lean_layers(model) as replaced:
        assert replaced == 6
        assert not [m for m in model.modules() if "forward" in m.__dict__ and hasattr(m, "act_fn")]


class PlusOne(nn.Module):
    """A norm that looks like the usual one and adds one to its weight, as Gemma's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.variance_epsilon)


class Centred(nn.Module):
    """A norm that takes the mean away first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, None, self.variance_epsilon)


@pytest.mark.parametrize("kind", [PlusOne, Centred])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_another_norm_is_left_alone(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = nn.Sequential(kind(16), nn.Linear(16, 16)).to(dtype)
    with lean_layers(model) as replaced:
        assert replaced == 0
        assert "forward" not in model[0].__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rms_norm(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    weight = torch.linspace(0.5, 2, 32).to(dtype).requires_grad_()
    kept = x.detach().clone()
    out = _RMSNorm.apply(x, weight, 1e-6)
    assert torch.equal(x, kept), "the input was written to"
    exact = nn.functional.rms_norm(x.float(), (32,), weight.float(), 1e-6)
    tolerance = TIGHT if dtype == torch.float32 else LOOSE
    assert out.dtype == dtype
    assert near(out, exact, tolerance)
    found = torch.autograd.grad(out.float().pow(3).sum(), (x, weight))
    for a, b in zip(found, torch.autograd.grad(exact.pow(3).sum(), (x, weight)), strict=True):
        assert a.dtype == dtype
        assert near(a, b, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gated_silu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(7, 33, generator=generator).mul(3).to(dtype).requires_grad_() for _ in range(2))
    out = _GatedSiLU.apply(gate, up)
    exact = nn.functional.silu(gate.float()) * up.float()
    tolerance = TIGHT if dtype == torch.float32 else LOOSE
    assert near(out, exact, tolerance)
    found = torch.autograd.grad(out.float().square().sum(), (gate, up))
    for a, b in zip(found, torch.autograd.grad(exact.square().sum(), (gate, up)), strict=True):
        assert near(a, b, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rotary(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 6, 8, generator=generator).to(dtype).requires_grad_() for heads in (4, 2))
    angle = torch.randn(2, 6, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    ours, theirs = _rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    tolerance = TIGHT if dtype == torch.float32 else LOOSE
    for a, b in zip(ours, theirs, strict=True):
        assert near(a, b, tolerance)
    found = torch.autograd.grad(sum(x.float().pow(3).sum() for x in ours), (q, k))
    for a, b in zip(found, torch.autograd.grad(sum(x.float().pow(3).sum() for x in theirs), (q, k)), strict=True):
        assert near(a, b, tolerance)
