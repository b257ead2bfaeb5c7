"""Divided models, without dividing one: the loss inside the model, small twins, models made anew, FSDP's modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmkit.errors import UsageError, WontFitError
from llmkit.training import dividing
from llmkit.training.batching import Layout
from llmkit.training.checkpoints import Manifest, check_fits, publish, staging
from llmkit.training.fsdp import wrapped_modules
from llmkit.training.fsdp_settings import FsdpSettings
from llmkit.training.objective import choose
from llmkit.training.sharding import fill, parameter_types, skeleton, small_twin, whole_model

Load = Callable[..., Any]
CPU = torch.device("cpu")


def rows(count: int) -> list[Any]:
    ids = [np.arange(3 + 4 * i, dtype=np.int32) + 7 * i for i in range(count)]
    return [
        [(f"r{i}", row, np.where(np.arange(len(row)) < 2, -100, row).astype(np.int32))] for i, row in enumerate(ids)
    ]


def with_adapter(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_loss_inside_the_model_is_the_loss_after_it(adapter: bool, tiny_qwen: Path, load: Load) -> None:
    """Tied embeddings: the output layer's gradient and the input's come together."""
    model = load(tiny_qwen)
    model = with_adapter(model) if adapter else model
    bare = model.get_base_model() if adapter else model
    outer, _ = choose(model, seq2seq=False, own_attention=True, device=CPU)
    inner = outer.within(model, CPU)
    assert inner.inside
    (part,) = Layout(flat=outer.flat, part_tokens=0, pad_id=0).batch(rows(3)).parts
    found = []
    for objective in (outer, inner):
        model.zero_grad()
        with objective.active(bare):
            loss = objective(model, part)
            loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_filler_takes_part_and_changes_nothing(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama)
    objective, _ = choose(model, seq2seq=False, own_attention=True, device=CPU)
    inside = objective.within(model, CPU)
    filler = Layout(flat=True, part_tokens=0, pad_id=0).filler()
    assert (filler.supervised, filler.tokens) == (0, 1)
    with inside.active(model):
        loss = inside(model, filler)
        loss.backward()
    assert float(loss.detach()) == 0
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and not g.any() for g in gradients), "every weight's hook has to be called"


def test_a_twin_is_small_and_of_the_same_kind(tiny_qwen: Path, load: Load) -> None:
    model = with_adapter(load(tiny_qwen))
    twin = small_twin(model, CPU)
    assert type(twin.get_base_model()) is type(model.get_base_model())
    assert twin.peft_config["default"].r == 2
    a, _ = choose(model, seq2seq=False, own_attention=True, device=CPU)
    b, _ = choose(twin, seq2seq=False, own_attention=True, device=CPU)
    assert (a.flat, a.fused, a.by_rows) == (b.flat, b.fused, b.by_rows)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_made_anew_is_the_same(adapter: bool, tiny_qwen: Path, load: Load) -> None:
    model = load(tiny_qwen)
    model = with_adapter(model) if adapter else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    made = whole_model(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, model(ids).logits)
    assert parameter_types(made) == parameter_types(model)


def test_a_weight_that_got_lost_is_not_made_up(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama)
    found = {name: p.detach() for name, p in model.named_parameters()}
    found.pop("model.norm.weight")
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        fill(skeleton(model.config, type(model), torch.float32), found)


def test_fsdp_wraps_layers(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama)
    assert [type(m).__name__ for m in wrapped_modules(model, FsdpSettings())] == ["LlamaDecoderLayer"] * 2
    named = FsdpSettings(transformer_layer_cls_to_wrap=["LlamaMLP"])
    assert len(wrapped_modules(model, named)) == 2
    with pytest.raises(UsageError, match=r"has no Block.*LlamaDecoderLayer"):
        wrapped_modules(model, FsdpSettings(transformer_layer_cls_to_wrap=["Block"]))
    by_size = wrapped_modules(model, FsdpSettings(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=20_000))
    assert {type(m).__name__ for m in by_size} >= {"LlamaMLP", "Embedding"}
    assert wrapped_modules(model, FsdpSettings(auto_wrap_policy="NO_WRAP")) == []


def test_a_checkpoint_of_another_engine_does_not_fit(tmp_path: Path) -> None:
    """[17]"""
    mine = Manifest(step=3, world_size=2, batch=4, data="x", engine="zero2")
    made = publish(staging(tmp_path, 3), tmp_path, mine)
    check_fits(made, copy.copy(mine))
    for engine, says in (("", "without sharding"), ("fsdp", "by FSDP2"), ("zero3", "by ZeRO stage 3")):
        with pytest.raises(UsageError, match=f"by ZeRO stage 2, and this run trains {says}.*export-weights"):
            check_fits(made, Manifest(step=3, world_size=2, batch=4, data="x", engine=engine))


def test_an_offload_that_would_exhaust_the_host_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[30], all processes of the machine together."""
    from llmkit.recipe import parse
    from llmkit.stages.sft import Recipe

    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = parse(
        {
            "name": "x",
            "model": {"name_or_path": str(tiny_llama)},
            "data": {"train": str(data)},
            "deepspeed": "zero2_offload",
        },
        Recipe,
    )
    ctx: Any = type("Ctx", (), {"world_size": 2})()
    dividing.check_host(recipe, ctx)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(dividing, "host_memory", lambda: 1e8)
    with pytest.raises(WontFitError, match=r"for the 2 on this machine, which has 0\.1 GiB"):
        dividing.check_host(recipe, ctx)
