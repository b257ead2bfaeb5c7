"""A LoRA layer in one pass equals PEFT's, and what is more than plain LoRA is left to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit.training.lora_layer import kept_mask, lean_adapters

TIGHT, LOOSE = 1e-5, 3e-2


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach().float(), b.detach().float()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * (b.norm() + 1e-3))


def adapted(dtype: torch.dtype = torch.float32, *, base_bias: bool = True, **config: Any) -> Any:
    """A frozen layer of 12 to 20 with an adapter whose two matrices are random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=base_bias)).to(dtype)
    return get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["0"], "init_lora_weights": False} | config))


def outcome(model: Any, x: Tensor, *, fast: bool) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    learned = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    if fast:
        with lean_adapters(model) as replaced:
            assert replaced == 1
            out = model(leaf)
            grads = torch.autograd.grad(out.float().square().sum(), [leaf, *learned])
    else:
        out = model(leaf)
        grads = torch.autograd.grad(out.float().square().sum(), [leaf, *learned])
    return [out, *grads]


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (0, 12), (1, 1, 12)], ids=str)
def test_output_and_gradients_equal_pefts(bias: bool, shape: tuple[int, ...]) -> None:
    model = adapted(base_bias=bias).train()
    x = sample(*shape)
    ours, theirs = outcome(model, x, fast=True), outcome(model, x, fast=False)
    assert len(ours) == 4
    assert all(near(a, b, TIGHT) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("config", [{"lora_alpha": 7}, {"use_rslora": True, "lora_alpha": 16}], ids=str)
def test_the_scale_is_pefts(config: dict[str, Any]) -> None:
    model = adapted(**config)
    ours, theirs = (outcome(model, sample(6, 12), fast=fast) for fast in (True, False))
    assert all(near(a, b, TIGHT) for a, b in zip(ours, theirs, strict=True))


def test_bfloat16_with_an_adapter_in_float32() -> None:
    model = adapted(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    ours, theirs = (outcome(model, sample(9, 12, dtype=torch.bfloat16), fast=fast) for fast in (True, False))
    assert [a.dtype for a in ours[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(near(a, b, LOOSE) for a, b in zip(ours, theirs, strict=True))


def test_dropout_is_that_of_its_mask_forward_and_backward() -> None:
    """The same computation with the same mask, written out."""
    model = adapted(lora_dropout=0.4, lora_alpha=8).train()
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = sample(30, 12)
    ours = outcome(model, x, fast=True)
    torch.manual_seed(1)
    mask = kept_mask(x, 0.4) != 0
    assert 0.3 < mask.float().mean() < 0.9
    leaf = x.clone().requires_grad_()
    dropped = torch.where(mask, leaf, 0.0) / 0.6
    out = layer.base_layer(leaf) + 2.0 * dropped @ a.t() @ b.t()
    grads = torch.autograd.grad(out.square().sum(), [leaf, a, b])
    assert all(near(x, y, TIGHT) for x, y in zip(ours, [out, *grads], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_keeps_the_share_that_it_should(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    mask = kept_mask(torch.empty(401, 499, dtype=dtype), p)
    kept = (mask != 0).float()
    assert set(mask.unique().tolist()) == {-1, 0}
    assert float(kept.mean()) == pytest.approx(1 - p, abs=0.005)
    assert float(kept.mean(0).std()) < 0.05 and float(kept.mean(1).std()) < 0.05, "rows or columns go together"
    flat = kept.flatten() - kept.mean()
    for lag in (1, 2, 3, 4):  # four elements share a draw
        assert abs(float((flat[:-lag] * flat[lag:]).mean())) < 0.01


def test_dropout_is_repeated_with_the_seed_and_absent_in_evaluation() -> None:
    model = adapted(lora_dropout=0.5).train()
    x = sample(8, 12)
    first, again = outcome(model, x, fast=True), outcome(model, x, fast=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    model.eval()
    ours, theirs = outcome(model, x, fast=True), outcome(model, x, fast=False)
    assert not torch.equal(ours[0], first[0])
    assert all(near(a, b, TIGHT) for a, b in zip(ours, theirs, strict=True))


def test_a_view_as_input() -> None:
    model = adapted(lora_dropout=0.5)
    x = sample(12, 9).t()
    assert not x.is_contiguous()
    with lean_adapters(model):
        torch.manual_seed(4)
        strided = model.train()(x)
        torch.manual_seed(4)
        assert torch.equal(strided, model(x.contiguous()))


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}],
    ids=str,
)  # fmt: skip
def test_more_than_plain_lora_is_left_to_peft(config: dict[str, Any]) -> None:
    model = adapted(**config)
    with lean_adapters(model) as replaced:
        assert replaced == 0


def test_mixed_precision_merged_and_disabled_layers_go_pefts_way() -> None:
    model = adapted().eval()
    x = sample(5, 12)
    with lean_adapters(model):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        with model.disable_adapter():
            off = model(x)
        model.merge_adapter()
        merged = model(x)
        model.unmerge_adapter()
    plain = model(x)
    assert mixed.dtype == torch.bfloat16
    assert near(mixed, plain, LOOSE)
    assert near(merged, plain, TIGHT)
    assert near(off, model.base_model.model[0].base_layer(x), TIGHT)


def quantized(folder: Path, kind: str, **adapter: Any) -> Any:
    """A quantized tiny model whose adapter is random in both halves."""
    from llmkit.modeling.adapters import attach
    from llmkit.modeling.load import open_model
    from llmkit.modeling.settings import AdapterSettings, QuantizationSettings

    base = open_model(folder, dtype="bfloat16", quantization=QuantizationSettings(type=kind))  # type: ignore[arg-type]
    model = attach(base, AdapterSettings(**{"r": 4} | adapter), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 20
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantized_layer_too(kind: str, tiny_llama: Path) -> None:
    layer = quantized(tiny_llama, kind).base_model.model.model.layers[0].mlp.up_proj
    x = sample(2, 9, 64, dtype=torch.bfloat16)
    ours, theirs = outcome(layer, x, fast=True), outcome(layer, x, fast=False)
    assert len(ours) == 4
    assert [a.dtype for a in ours] == [a.dtype for a in theirs]
    assert all(near(a, b, LOOSE) for a, b in zip(ours, theirs, strict=True))


def test_a_quantized_layer_that_multiplies_in_another_type_goes_pefts_way(tiny_llama: Path) -> None:
    layer = quantized(tiny_llama, "nf4").base_model.model.model.layers[0].mlp.up_proj
    x = sample(5, 64)  # float32, and the weights are multiplied in bfloat16
    with lean_adapters(layer):
        lean = layer(x)
    assert torch.equal(lean, layer(x))


def test_dora_over_a_quantized_layer_is_left_to_peft(tiny_llama: Path) -> None:
    with lean_adapters(quantized(tiny_llama, "nf4", use_dora=True)) as replaced:
        assert replaced == 0


def test_it_goes_away_again(tiny_llama: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(target_modules="all-linear"))
    with pytest.raises(RuntimeError, match="in between"), lean_adapters(model) as replaced:
        assert replaced == 14
        raise RuntimeError("in between")
    assert not [m for m in model.modules() if "forward" in m.__dict__]
