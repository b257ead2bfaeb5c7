"""The objective that is chosen gives the model's own loss, by the leanest way that the model allows: the model is asked,
its class and version are not looked at [33]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkit.data.store import TokenStore
from llmkit.errors import UsageError
from llmkit.training.batching import Layout, Sequences, TokenRow
from llmkit.training.objective import Objective, choose

CPU = torch.device("cpu")
MakeStore = Callable[..., TokenStore]
Load = Callable[..., Any]


def chosen(model: Any, **kwargs: Any) -> tuple[Objective, list[str]]:
    return choose(model, **{"seq2seq": False, "own_attention": True, "device": CPU} | kwargs)


def summed(objective: Objective, model: Any, sequences: list[list[TokenRow]], part_tokens: int = 0) -> Tensor:
    seq2seq = objective._shift is not None
    layout = Layout(flat=objective.flat, part_tokens=part_tokens, pad_id=0, seq2seq=seq2seq)
    with objective.active(model):
        total = torch.zeros(())
        for part in layout.batch(sequences).parts:
            total = total + objective(model, part)
    return total


def own_loss(model: Any, rows: list[TokenRow]) -> Tensor:
    """The model's own loss of each row alone, summed over its tokens."""
    total = torch.zeros(())
    for _, ids, labels in rows:
        wanted = torch.from_numpy(labels.astype(np.int64))[None]
        causal = not model.config.is_encoder_decoder
        count = int((labels[1:] if causal else labels).__ne__(-100).sum())
        if count:
            total = total + count * model(torch.from_numpy(ids.astype(np.int64))[None], labels=wanted).loss
    return total


def rows_of(store: TokenStore) -> list[TokenRow]:
    return [(store.row_id(i), *store.row(i)) for i in range(len(store))]


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


def assert_same_gradients(loss: Tensor, expected: Tensor, model: Any, tolerance: float = 1e-4) -> None:
    for a, b in zip(gradients(loss, model), gradients(expected, model), strict=True):
        assert a is not None and b is not None
        assert float((a - b).norm()) <= tolerance * float(b.norm() + 1e-3)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen"])
def test_llama_and_qwen_get_flat_rows_and_the_fused_loss(
    kind: str, request: pytest.FixtureRequest, load: Load, make_store: MakeStore
) -> None:
    model = load(request.getfixturevalue(kind))
    objective, notes = chosen(model)
    assert (objective.flat, objective.fused, objective.by_rows, notes) == (True, True, True, [])
    rows = rows_of(make_store([5, 17, 9, 2]))
    ours, own = summed(objective, model, [rows]), own_loss(model, rows)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    assert_same_gradients(ours, own, model)
    assert "forward" not in objective.head.__dict__


def test_packed_loss_equals_unpacked_loss(tiny_llama: Path, load: Load, make_store: MakeStore) -> None:
    """[12], with and without parts: the same rows in one sequence, in several, and padded."""
    model = load(tiny_llama)
    objective, _ = chosen(model)
    sequences = Sequences.of(make_store([5, 17, 9, 2, 30, 12]), packing=True, max_length=40)
    packed = [sequences[i] for i in range(len(sequences))]
    assert 1 < len(packed) < 6
    single = [[row] for sequence in packed for row in sequence]
    padded = Objective(objective.head, flat=False, fused=True, device=CPU)
    for found in (
        summed(objective, model, packed),
        summed(objective, model, packed, part_tokens=40),
        summed(objective, model, single, part_tokens=1),
    ):
        expected = summed(padded, model, single)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert_same_gradients(found, expected, model)


def test_t5_is_padded_fused_and_reads_its_answer_shifted(tiny_t5: Path, load: Load, make_store: MakeStore) -> None:
    model = load(tiny_t5)
    objective, notes = chosen(model, seq2seq=True)
    assert (objective.flat, objective.fused, notes) == (False, True, [])
    rows = rows_of(make_store([5, 17, 9], seq2seq=True))
    ours, own = summed(objective, model, [[row] for row in rows]), own_loss(model, rows)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    assert_same_gradients(ours, own, model)


def test_the_decoder_reads_the_token_before_the_one_that_it_is_asked_for(
    tiny_t5: Path, load: Load, make_store: MakeStore
) -> None:
    model = load(tiny_t5)
    objective, _ = chosen(model, seq2seq=True)
    name, ids, labels = rows_of(make_store([12], seq2seq=True))[0]
    changed = labels.copy()
    changed[-1] = 7
    for answer in (labels, changed):
        (part,) = Layout(flat=False, part_tokens=0, pad_id=0, seq2seq=True).batch([[(name, ids, answer)]]).parts
        read = objective._inputs(part)["decoder_input_ids"]
        assert read.tolist() == [[model.config.decoder_start_token_id, *answer[:-1].tolist()]]


def test_a_decoder_that_does_not_say_what_it_reads_is_refused(
    tiny_t5: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import T5ForConditionalGeneration

    model = load(tiny_t5)
    monkeypatch.delattr(T5ForConditionalGeneration, "prepare_decoder_input_ids_from_labels")
    with pytest.raises(UsageError, match="T5ForConditionalGeneration does not say what its decoder reads"):
        chosen(model, seq2seq=True)


def gemma2(cap: float | None, attention_cap: float | None = None) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, final_logit_softcapping=cap,
        attn_logit_softcapping=attention_cap, attn_implementation="eager" if attention_cap else "sdpa",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def granite(scale: float) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=scale,
    )  # fmt: skip
    return GraniteForCausalLM(config).eval()


@pytest.mark.parametrize("weights", ["fresh", "grown"])
@pytest.mark.parametrize("make", [lambda: gemma2(30.0), lambda: granite(8.0)], ids=["softcap", "scale"])
def test_logits_that_are_changed_after_the_output_layer_are_not_fused(
    make: Callable[[], Any], weights: str, make_store: MakeStore
) -> None:
    """A model that was just initialised has logits too small for a cap to show; it is found all the same."""
    model = make()
    if weights == "grown":
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(60)
    objective, notes = chosen(model)
    assert not objective.fused
    assert any("changes its logits" in note for note in notes)
    rows = rows_of(make_store([5, 17, 9]))
    ours, own = summed(objective, model, [rows] if objective.flat else [[r] for r in rows]), own_loss(model, rows)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-4)
    assert_same_gradients(ours, own, model, 1e-3)


def test_the_same_models_without_them_are_fused() -> None:
    for model in (gemma2(None), granite(1.0)):
        assert chosen(model)[0].fused


def test_soft_caps_in_the_attention_fall_back_to_the_models_own(make_store: MakeStore) -> None:
    model = gemma2(None, attention_cap=50.0)
    objective, _ = chosen(model)
    assert not objective.by_rows
    rows = rows_of(make_store([5, 17, 9]))
    ours, own = summed(objective, model, [rows] if objective.flat else [[r] for r in rows]), own_loss(model, rows)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-4)


def test_sliding_windows_are_kept(make_store: MakeStore) -> None:
    model = gemma2(None)
    objective, _ = chosen(model)
    rows = rows_of(make_store([40, 50]))
    ours, own = summed(objective, model, [rows]), own_loss(model, rows)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    assert_same_gradients(ours, own, model)


def test_rows_that_cannot_be_kept_apart_are_padded() -> None:
    """Rotary embeddings aside, a recurrent model carries its state on: its rows are padded, and a note says so."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=32, state_size=8, num_hidden_layers=2, use_mambapy=False)
    ).eval()
    objective, notes = chosen(model)
    assert not objective.flat
    assert any("padded" in note for note in notes)


def test_the_recipes_attention_is_kept(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama, attn_implementation="eager")
    objective, _ = chosen(model, own_attention=False)
    assert not objective.by_rows
    with objective.active(model):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"]])
def test_an_adapter_is_seen_by_the_loss(
    targets: str | list[str], tiny_llama: Path, load: Load, make_store: MakeStore
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load(tiny_llama), LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    objective, notes = chosen(model)
    assert (objective.flat, objective.fused, notes) == (True, True, [])
    bare = model.get_base_model()
    rows = rows_of(make_store([5, 17]))
    layout = Layout(flat=True, part_tokens=0, pad_id=0)
    with objective.active(bare):
        ours = objective(model, layout.batch([rows]).parts[0])
    own = own_loss(model, rows)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    assert_same_gradients(ours, own, model)


def test_training_mode_and_randomness_are_left_as_they_were(tiny_llama: Path, load: Load) -> None:
    model = load(tiny_llama).train()
    state = torch.get_rng_state()
    chosen(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
