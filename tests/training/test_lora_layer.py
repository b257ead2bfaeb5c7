"""The one-pass LoRA layer against PEFT's own, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmkit.modeling.adapters import attach
from llmkit.modeling.settings import AdapterSettings
from llmkit.training.lora_layer import lean_adapters

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def adapted(folder: Path, dtype: torch.dtype, **settings: object) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = attach(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AdapterSettings(**settings), seed=0)  # type: ignore[arg-type]
    with torch.no_grad():  # B begins at zero, where A has no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


def gradients(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def near(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return bool((a.float() - b.float()).norm() <= RELATIVE[dtype] * b.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_those_of_peft(tiny_llama: Path, dtype: torch.dtype) -> None:
    model = adapted(tiny_llama, dtype)
    loss, grads = gradients(model)
    with lean_adapters(model) as replaced:
        lean_loss, lean_grads = gradients(model)
    assert replaced == 14  # seven linear layers in each of two blocks
    assert near(lean_loss, loss, dtype)
    assert len(grads) == len(lean_grads) == 28
    assert all(near(a, b, dtype) for a, b in zip(lean_grads, grads, strict=True))


def test_dropout_is_drawn_anew_and_repeats_with_the_seed(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, torch.float32, lora_dropout=0.5).train()
    with lean_adapters(model) as replaced:
        first, grads = gradients(model)
        again, same = gradients(model)
        model.eval()
        without, _ = gradients(model)
    assert replaced == 14
    assert first == again and all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert first != without


def test_dropout_gradient_is_that_of_the_function(tiny_llama: Path) -> None:
    from llmkit.training.lora_layer import _LoraLinear

    x, weight, a, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=grad)
        for shape, grad in (((3, 5), True), ((4, 5), False), ((2, 5), True), ((4, 2), True))
    )

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        out: Tensor = _LoraLinear.apply(x, weight, None, a, b, 2.0, 0.4)  # type: ignore[no-untyped-call]
        return out

    assert torch.autograd.gradcheck(layer, (x, a, b))


def test_dora_and_what_is_not_plain_stay_as_they_are(tiny_llama: Path) -> None:
    with lean_adapters(adapted(tiny_llama, torch.float32, use_dora=True)) as replaced:
        assert replaced == 0


def test_forwards_are_put_back(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, torch.float32)
    with lean_adapters(model):
        pass
    assert not [m for m in model.modules() if "forward" in m.__dict__]


def test_the_mask_keeps_the_share_that_was_asked_for_without_pattern() -> None:
    from llmkit.training.lora_layer import kept_mask

    torch.manual_seed(0)
    masks = -torch.stack([kept_mask(torch.empty(101, 203), 0.3) for _ in range(40)]).float()
    assert abs(masks.mean() - 0.7) < 0.002
    for axis in (0, 1, 2):  # neither a row, a column nor a draw differs from the others by more than chance
        rest = [a for a in range(3) if a != axis]
        count = masks.numel() / masks.shape[axis]
        assert (masks.mean(dim=rest) - 0.7).abs().max() < 5 * (0.21 / count) ** 0.5
    flat = masks.flatten() - masks.mean()
    assert all(abs((flat[:-lag] * flat[lag:]).mean() / flat.var()) < 0.006 for lag in (1, 2, 3, 4, 203))
