"""Attention over rows in one sequence equals PyTorch's attention, a row at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmkit.training import attention
from llmkit.training.attention import NAME, row_attention, varlen_attention_forward

TIGHT, LOOSE = 2e-5, 2e-2


def inputs(
    tokens: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, dim: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, heads, tokens, dim), (1, kv_heads, tokens, dim), (1, kv_heads, tokens, dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def ours(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], window: int | None = None) -> Tensor:
    out, _ = varlen_attention_forward(nn.Module(), q, k, v, None, segments=segments, sliding_window=window)
    return out


def by_rows(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], window: int | None = None) -> Tensor:
    """Each row alone through PyTorch's attention with an explicit mask."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    done, start = [], 0
    for length in segments:
        row = slice(start, start + length)
        ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
        seen = ahead <= 0
        if window is not None:
            seen &= ahead > -window
        done.append(
            nn.functional.scaled_dot_product_attention(q[:, :, row], k[:, :, row], v[:, :, row], attn_mask=seen)
        )
        start += length
    return torch.cat(done, 2).transpose(1, 2)


def assert_near(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert float((a.float() - b.float()).norm()) <= tolerance * float(b.float().norm() + 0.1)


SEGMENTS = [(1,), (7,), (3, 1, 9), (300,), (256, 257), (700, 2)]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 5, 300])
def test_output_and_gradients_equal_attention_a_row_at_a_time(
    segments: tuple[int, ...], heads: int, kv_heads: int, window: int | None
) -> None:
    q, k, v = inputs(sum(segments), heads, kv_heads)
    out, expected = ours(q, k, v, segments, window), by_rows(q, k, v, segments, window)
    assert_near(out, expected, TIGHT)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        assert_near(a, b, TIGHT)


@pytest.mark.parametrize("window", [None, 20])
def test_bfloat16(window: int | None) -> None:
    segments = (40, 300)
    q, k, v = inputs(340, 4, 2, torch.bfloat16)
    out = ours(q, k, v, segments, window)
    assert out.dtype == torch.bfloat16
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = by_rows(*exact, segments, window)
    assert_near(out, expected, LOOSE)
    found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert_near(a, b, LOOSE)


def test_the_way_of_other_devices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = (5, 30, 1)
    q, k, v = inputs(36, 4, 2)
    for window in (None, 4):
        out = attention._by_rows(q[0], k[0], v[0], segments, 8**-0.5, window or 0)
        assert_near(out.transpose(0, 1)[None], by_rows(q, k, v, segments, window), TIGHT)


def test_a_row_does_not_see_another() -> None:
    """[12], at the attention: a changed row changes nothing outside of it, forward and backward."""
    segments = (6, 10, 4)
    q, k, v = inputs(20, 4, 2)
    before = ours(q, k, v, segments)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 6:16] += 5
    after = ours(*changed, segments)
    assert torch.equal(before[:, :6], after[:, :6])
    assert torch.equal(before[:, 16:], after[:, 16:])
    assert not torch.equal(before[:, 6:16], after[:, 6:16])
    grads = torch.autograd.grad(before[:, 6:16].sum(), (q, k, v))
    for grad in grads:
        assert not grad[:, :, :6].any() and not grad[:, :, 16:].any()


def test_what_it_cannot_do_is_refused() -> None:
    q, k, v = inputs(4, 2, 2)
    with pytest.raises(ValueError, match="softcap"):
        varlen_attention_forward(nn.Module(), q, k, v, None, segments=(4,), softcap=30.0)
    with pytest.raises(ValueError, match="s_aux"):
        varlen_attention_forward(nn.Module(), q, k, v, None, segments=(4,), s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="dropout"):
        varlen_attention_forward(nn.Module(), q, k, v, None, segments=(4,), dropout=0.1)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen"])
def test_a_model_takes_it_and_gets_its_own_back(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    folder: Path = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = model.config._attn_implementation
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        alone = torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], 1)
        with row_attention(model):
            assert model.config._attn_implementation == NAME
            together = model(ids, position_ids=positions, segments=(10, 14), use_cache=False).logits
        assert model.config._attn_implementation == own
        assert_near(together, alone, TIGHT)


def test_the_models_own_comes_back_after_an_error(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    own = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="in between"), row_attention(model):
        raise RuntimeError("in between")
    assert model.config._attn_implementation == own


def test_mixed_precision(tiny_llama: Path) -> None:
    """Weights in float32, products in bfloat16: queries and keys come in another type than values."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    sums = []
    for fast in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if fast:
                with row_attention(model):
                    logits = model(ids, position_ids=positions, segments=(10, 14), use_cache=False).logits
            else:
                logits = torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], 1)
        logits.float().square().mean().backward()  # outside, as trainers do it
        sums.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*sums, strict=True):
        assert_near(a, b, 0.05)
