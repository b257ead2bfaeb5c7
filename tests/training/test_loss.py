"""The fused cross entropy gives the loss and the gradients of the plain computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmkit.training import loss as module
from llmkit.training.loss import chunk_rows, linear_cross_entropy

TIGHT, LOOSE = 1e-5, 2e-2


def head_of(vocabulary: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, vocabulary, bias=bias).to(dtype)


def case(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = (3 * torch.randn(rows, 16, generator=generator)).to(dtype).requires_grad_()
    return hidden, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain(hidden: Tensor, head: nn.Module, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), target, reduction="sum")


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [g.float() for g in torch.autograd.grad(loss, leaves)]


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= tolerance * (b.float().norm() + 0.1))


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_equal_the_plain_ones_at_every_chunk_edge(
    rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 50 * 32)
    assert chunk_rows(50) == 32
    head = head_of(50, bias=bias)
    hidden, target = case(rows, 50)
    ours, theirs = linear_cross_entropy(hidden, head, target), plain(hidden, head, target)
    assert ours.dtype == torch.float32
    assert near(ours, theirs, TIGHT)
    leaves = [hidden, *head.parameters()]
    assert len(leaves) == 2 + bias
    # scaled, as the trainer scales it by the number of supervised tokens
    for a, b in zip(gradients(ours / 7, *leaves), gradients(theirs / 7, *leaves), strict=True):
        assert near(a, b, TIGHT)


def test_bfloat16_is_as_near_to_float32_as_the_plain_computation() -> None:
    head = head_of(200, dtype=torch.bfloat16)
    hidden, target = case(90, 200, torch.bfloat16)
    exact_head = head_of(200).requires_grad_()
    exact_head.load_state_dict({k: v.float() for k, v in head.state_dict().items()})
    exact_hidden = hidden.detach().float().requires_grad_()
    exact = plain(exact_hidden, exact_head, target)
    ours = linear_cross_entropy(hidden, head, target)
    assert near(ours, exact, LOOSE)
    wanted = gradients(exact, exact_hidden, exact_head.weight)
    for a, b in zip(gradients(ours, hidden, head.weight), wanted, strict=True):
        assert near(a, b, LOOSE)


def test_nothing_to_learn_gives_zero_and_zero_gradients_for_every_parameter() -> None:
    """A rank without a row takes part in the step: its parameters must all get a gradient."""
    for head in (head_of(50, bias=True), nn.Sequential(head_of(50))):
        hidden, target = case(0, 50)
        loss = linear_cross_entropy(hidden, head, target)
        assert float(loss) == 0.0
        found = gradients(loss, hidden, *head.parameters())
        assert all(not grad.any() for grad in found)


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_layer_gets_no_gradient_and_the_states_get_theirs(bias: bool) -> None:
    head = head_of(50, bias=bias).requires_grad_(False)
    hidden, target = case(40, 50)
    ours = linear_cross_entropy(hidden, head, target)
    (wanted,) = gradients(plain(hidden, head, target), hidden)
    ours.backward()
    assert near(hidden.grad, wanted, TIGHT)
    assert all(p.grad is None for p in head.parameters())


def test_frozen_states_leave_the_layer_its_gradient() -> None:
    head = head_of(50)
    hidden, target = case(40, 50)
    frozen = hidden.detach()
    (wanted,) = gradients(plain(frozen, head, target), head.weight)
    (found,) = gradients(linear_cross_entropy(frozen, head, target), head.weight)
    assert near(found, wanted, TIGHT)


class Doubled(nn.Linear):
    """A head that is not a plain linear layer, though it derives from one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("rows", [1, 255, 256, 257])
def test_a_layer_that_is_more_than_linear_is_run_as_it_is(rows: int) -> None:
    torch.manual_seed(0)
    head = Doubled(16, 50)
    hidden, target = case(rows, 50)
    ours, theirs = linear_cross_entropy(hidden, head, target), plain(hidden, head, target)
    assert near(ours, theirs, TIGHT)
    leaves = [hidden, *head.parameters()]
    for a, b in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        assert near(a, b, TIGHT)


def test_an_adapter_on_the_output_layer_is_learned() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"head": nn.Linear(16, 50)}), LoraConfig(target_modules=["head"], init_lora_weights=False)
    )
    head = model.base_model.model["head"]
    hidden, target = case(20, 50)
    leaves = [p for p in head.parameters() if p.requires_grad]
    assert len(leaves) == 2
    ours = gradients(linear_cross_entropy(hidden, head, target), *leaves)
    for a, b in zip(ours, gradients(plain(hidden, head, target), *leaves), strict=True):
        assert near(a, b, TIGHT)


def test_mixed_precision_equals_the_plain_computation_under_it() -> None:
    head = head_of(50, bias=True)
    hidden, target = case(40, 50)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = linear_cross_entropy(hidden, head, target), plain(hidden, head, target)
    assert near(ours, theirs, LOOSE)
    leaves = [hidden, *head.parameters()]
    for a, b in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        assert near(a, b, LOOSE)


def test_a_hopeless_target_gives_a_finite_loss() -> None:
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[1000.0], [-1000.0]])
    loss = linear_cross_entropy(torch.ones(1, 1, requires_grad=True), head, torch.tensor([1]))
    assert torch.isfinite(loss)
    loss.backward()
    assert head.weight.grad is not None and torch.isfinite(head.weight.grad).all()


def test_states_that_are_not_a_number_give_a_loss_that_is_none() -> None:
    head = head_of(50)
    hidden, target = case(4, 50)
    broken = hidden.detach().clone()
    broken[2, 3] = float("nan")
    broken.requires_grad_()
    loss = linear_cross_entropy(broken, head, target)
    assert not torch.isfinite(loss)
