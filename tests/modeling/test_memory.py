"""Memory by arithmetic: every number here was worked out by hand from the sizes of a small model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmkit.modeling.architecture import Architecture, Tensor
from llmkit.modeling.memory import (
    KERNEL,
    ON_THE_WAY,
    Setup,
    Sharding,
    activations,
    adapter_parameters,
    base_weights,
    checkpoint_bytes,
    disk,
    flops_per_token,
    head_gradient,
    kernels,
    layer_activations,
    logits,
    optimizer_states,
    predict,
    trainable_parameters,
)
from llmkit.modeling.settings import AdapterSettings

H, F, V, LAYERS, HEADS, KV, DIM = 8, 16, 100, 2, 4, 2, 2


def tensors(*, tied: bool = False) -> tuple[Tensor, ...]:
    """A Llama of two layers: hidden 8, inner 16, 4 heads of 2 of which 2 hold keys, 100 tokens."""
    made = [Tensor("model.embed_tokens.weight", (V, H))]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        made += [
            Tensor(f"{layer}.self_attn.q_proj.weight", (8, 8)), Tensor(f"{layer}.self_attn.k_proj.weight", (4, 8)),
            Tensor(f"{layer}.self_attn.v_proj.weight", (4, 8)), Tensor(f"{layer}.self_attn.o_proj.weight", (8, 8)),
            Tensor(f"{layer}.mlp.gate_proj.weight", (16, 8)), Tensor(f"{layer}.mlp.up_proj.weight", (16, 8)),
            Tensor(f"{layer}.mlp.down_proj.weight", (8, 16)), Tensor(f"{layer}.input_layernorm.weight", (8,)),
            Tensor(f"{layer}.post_attention_layernorm.weight", (8,)),
        ]  # fmt: skip
    made.append(Tensor("model.norm.weight", (H,)))
    return tuple(made if tied else [*made, Tensor("lm_head.weight", (V, H))])


def architecture(*, tied: bool = False, **changes: Any) -> Architecture:
    made = Architecture("llama", H, LAYERS, HEADS, KV, DIM, F, V, tensors(tied=tied), "test", "bfloat16")
    return replace(made, **changes)


def setup(**changes: Any) -> Setup:
    given: dict[str, Any] = {
        "architecture": architecture(), "cpu": True, "dtype": "bfloat16", "part_tokens": 64, "row_tokens": 32,
    }  # fmt: skip
    return Setup(**given | changes)


LAYER = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 16 * 8 + 2 * 8  # 592
ALL = 2 * LAYER + 8 + 2 * V * H  # 2,792


def test_parameters() -> None:
    a = architecture()
    assert (LAYER, a.parameters, a.layer_parameters) == (592, ALL, LAYER)
    assert not a.tied
    assert architecture(tied=True).parameters == ALL - V * H
    assert architecture(tied=True).tied
    assert trainable_parameters(a, None) == ALL


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        # q, o: 8+8; k, v: 8+4; gate, up, down: 8+16: 128 for each layer and rank
        ({"r": 3}, 3 * 128 * 2),
        ({"r": 3, "target_modules": ["q_proj", "v_proj"]}, 3 * (16 + 12) * 2),
        ({"r": 1, "target_modules": r"model\.layers\.0\..*down_proj"}, 24),
        # DoRA: a magnitude for each output: 8+4+4+8+16+16+8
        ({"r": 1, "use_dora": True}, (128 + 64) * 2),
        ({"r": 1, "modules_to_save": ["lm_head"]}, 128 * 2 + V * H),
    ],
)
def test_adapters(adapter: dict[str, Any], count: int) -> None:
    assert trainable_parameters(architecture(), AdapterSettings(**adapter)) == count


def test_an_adapter_is_not_put_on_embeddings_or_norms() -> None:
    everything = AdapterSettings(r=1, target_modules=".*")
    assert adapter_parameters(architecture(), everything) == 128 * 2


def test_quantized_weights() -> None:
    linear, rest = 2 * 576, ALL - 2 * 576
    adapter = AdapterSettings(r=1)
    assert base_weights(setup(adapter=adapter)) == ALL * 2
    assert base_weights(setup(adapter=adapter, quantization="nf4")) == pytest.approx(rest * 2 + linear * 4.127 / 8)
    once = setup(adapter=adapter, quantization="nf4", double_quant=False)
    assert base_weights(once) == pytest.approx(rest * 2 + linear * 4.5 / 8)
    rows = 2 * (8 + 4 + 4 + 8 + 16 + 16 + 8)
    assert base_weights(setup(adapter=adapter, quantization="int8")) == rest * 2 + linear + 4 * rows


def test_optimizer_states() -> None:
    assert optimizer_states(setup()) == 2 * 2 * ALL  # two moments in bfloat16
    assert optimizer_states(setup(dtype="float32")) == 2 * 4 * ALL
    assert optimizer_states(setup(optimizer="sgd")) == 0
    assert optimizer_states(setup(adapter=AdapterSettings(r=1))) == 2 * 4 * 256  # adapters are float32
    # Adafactor: rows and columns; norms in full
    matrices = 2 * (16 + 12 + 12 + 16 + 24 * 3) + 2 * (V + H)
    assert optimizer_states(setup(optimizer="adafactor")) == 4 * (matrices + 2 * 16 + 8)


def test_what_a_layer_keeps_on_a_cpu() -> None:
    """Twice the residual stream with a float32 each, twice its norm, queries twice (attention, output), keys and values,
    gate, up and their product."""
    assert layer_activations(setup()) == 2 * (2 * H + 2 * H + 2 * 8 + 2 * 4 + 3 * F) + 2 * 4
    assert layer_activations(setup(dtype="float32")) == 4 * (2 * H + 2 * H + 2 * 8 + 2 * 4 + 3 * F) + 2 * 4


def test_what_a_layer_keeps_in_mixed_precision() -> None:
    """The residual stream in float32, a bfloat16 copy of the norm for each of q, k, v and gate, up."""
    found = layer_activations(setup(dtype="float32", mixed="bfloat16"))
    assert found == 2 * (4 * H + 4) + (3 + 2) * 2 * H + 2 * (2 * 8 + 2 * 4 + 3 * F)


def test_what_a_layer_keeps_under_an_adapter() -> None:
    """A frozen matrix needs no input of its own: what no adapter reads is not kept."""
    fixed = 2 * (2 * H + 4) + 2 * (8 + 2 * 4) + 2 * 2 * F  # norms, attention, gate and up
    some = setup(adapter=AdapterSettings(r=4, target_modules=["q_proj", "v_proj"]))
    assert layer_activations(some) == fixed + 2 * H + 2 * (2 * 4)  # their input once, and two inner products
    every = setup(adapter=AdapterSettings(r=4))
    assert layer_activations(every) == fixed + 2 * (H + 8 + H + F) + 7 * 2 * 4
    dropout = setup(adapter=AdapterSettings(r=4, lora_dropout=0.1))
    assert layer_activations(dropout) == layer_activations(every) + 2 * (3 * H + 8 + 2 * H + F)  # a mask for each


def test_plain_layers_keep_more_than_our_own() -> None:
    assert layer_activations(setup(lean=False)) > layer_activations(setup())
    flash = layer_activations(setup(cpu=False))
    eager = layer_activations(setup(cpu=False, flash=False))
    scores = HEADS * 32 * (4 + 2)  # a row of 32 tokens: the softmax in float32 and in bfloat16
    assert eager - flash == scores + 2 * (8 + 2 * 4) - (2 * 4 * 8 + 4 * HEADS)


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer() -> None:
    ends = 2 * 2 * H + 2 * 2 * DIM + 3 * 8
    layer = layer_activations(setup())
    assert activations(setup()) == 64 * (LAYERS * layer + ends)
    assert activations(setup(checkpointing=True)) == 64 * (LAYERS * 2 * H + layer + ends)


def test_flat_sequences_are_rounded_up() -> None:
    assert activations(setup(part_tokens=33)) == activations(setup(part_tokens=64))


def test_logits_are_held_a_chunk_at_a_time() -> None:
    """64 rows of 100: bfloat16, cast to float32, softmax; the states, their gradient, and what the index picked."""
    assert logits(setup()) == 64 * V * (2 + 4 + 4) + 3 * 64 * H * 2
    assert logits(setup(dtype="float32")) == 64 * V * (4 + 4) + 3 * 64 * H * 4
    large = setup(architecture=architecture(vocabulary=150_000), part_tokens=4096)
    chunk = 32 * 150_000 * 10  # 2^23 / 150,000 is 55, rounded down to 32
    assert logits(large) == chunk + 3 * 4096 * H * 2
    whole = logits(replace(large, fused_loss=False))
    assert whole == 150_000 * (4096 * 2 + 4096 * (2 + 4 + 4 + 4))


def at_peak(given: Setup, name: str) -> float:
    return sum(t.at_peak for t in predict(given, base=0).terms if t.name == name)


def test_gradients_take_the_place_of_activations_unless_passes_add_up() -> None:
    gpu = setup(cpu=False, part_tokens=2048)
    assert at_peak(gpu, "gradients") == 0
    assert at_peak(replace(gpu, passes=2), "gradients") == 2 * ALL
    # Few tokens: the gradients are more than what the backward pass frees.
    few = setup(cpu=False, part_tokens=1, dtype="float32", architecture=architecture(vocabulary=V))
    freed = activations(few) + logits(few) + head_gradient(few)
    assert at_peak(few, "gradients") == max(0, 4 * ALL - freed)


def test_gradients_leave_holes_in_the_heap() -> None:
    """On a CPU they count, but for blocks of 32 MB and more, which the C library maps one by one."""
    assert at_peak(setup(part_tokens=2048), "gradients") == 2 * ALL
    wide = Tensor("model.layers.0.mlp.wide.weight", (4096, 4096))  # 32 MB in bfloat16
    large = setup(architecture=architecture(tensors=(*tensors(), wide)))
    assert at_peak(large, "gradients") == 2 * ALL


def test_the_peak_is_the_sum_of_the_terms() -> None:
    memory = predict(setup(), base=1000, data=8)
    assert memory.device == memory.host == sum(t.at_peak for t in memory.terms)
    assert memory.size("weights") == 2 * ALL
    assert memory.size("process") == 1000 + ON_THE_WAY
    gpu = predict(setup(cpu=False), base=10, host_base=1000, data=8)
    assert gpu.device == sum(t.at_peak for t in gpu.terms if not t.host)
    assert gpu.host == 1000 + 8 + 2 * ALL  # the weights pass through the host


def test_zero_divides_stage_by_stage() -> None:
    """arXiv 1910.02054, figure 1, with four processes: 12 bytes of states, then gradients, then weights."""
    for stage, (weights, gradients, states) in {
        0: (2, 2, 4), 1: (2, 2, 12 / 4), 2: (2, 2 / 4, 12 / 4), 3: (2 / 4, 2 / 4, 12 / 4),
    }.items():  # fmt: skip
        memory = predict(setup(processes=4, sharding=Sharding(stage)), base=0)
        assert memory.size("weights") == pytest.approx(weights * ALL), stage
        assert memory.size("gradients") == pytest.approx(gradients * ALL), stage
        assert memory.size("optimizer") == pytest.approx(states * ALL), stage


def test_offload_moves_the_states_to_the_host() -> None:
    plain = predict(setup(cpu=False, processes=4, sharding=Sharding(2)), base=0)
    moved = predict(setup(cpu=False, processes=4, sharding=Sharding(2, optimizer="cpu")), base=0)
    assert plain.device - moved.device == pytest.approx(3 * ALL)
    nvme = predict(setup(cpu=False, processes=4, sharding=Sharding(3, optimizer="nvme", parameters="nvme")), base=0)
    assert nvme.host < moved.host


def test_the_names_of_the_ways_to_divide() -> None:
    given = [
        Sharding(), Sharding(1), Sharding(2, optimizer="cpu"), Sharding(3, optimizer="cpu", parameters="cpu"),
        Sharding(3, optimizer="nvme", parameters="nvme"), Sharding(3, fsdp=True),
    ]  # fmt: skip
    assert [s.name for s in given] == ["none", "zero1", "zero2_offload", "zero3_offload", "zero3_nvme", "fsdp"]


def test_disk() -> None:
    each = (2 + 4) * ALL
    assert checkpoint_bytes(setup()) == each
    assert disk(setup(), keep=2, checkpoints=10) == 3 * each + 2 * ALL  # two kept, one being written, the result
    assert disk(setup(), keep=2, checkpoints=1) == each + 2 * ALL
    assert disk(setup(), keep=None, checkpoints=10) == 10 * each + 2 * ALL


def test_arithmetic_of_a_token() -> None:
    matrices = 2 * 576
    found = flops_per_token(setup(supervised=0.5), 10)
    assert found == 6 * matrices + 0.5 * 6 * V * H + 12 * LAYERS * HEADS * DIM * 10
    adapted = flops_per_token(setup(supervised=1.0, adapter=AdapterSettings(r=1)), 10)
    assert adapted == 4 * matrices + 4 * V * H + 6 * 256 + 12 * LAYERS * HEADS * DIM * 10


def test_head_gradient_is_there_only_where_the_head_learns() -> None:
    assert head_gradient(setup()) == 2 * V * H
    assert head_gradient(setup(adapter=AdapterSettings())) == 0
    assert head_gradient(setup(adapter=AdapterSettings(modules_to_save=["lm_head"]))) == 2 * V * H


def test_compiled_kernels() -> None:
    """Four shapes of matrices: q and o, k and v, gate and up, down. Three products each, and three of the output layer."""
    assert kernels(setup(totals=2, blocks=10)) == (2 * (4 * 3 + 3) + 6 * 10) * KERNEL
    assert kernels(setup(adapter=AdapterSettings(), totals=1)) == (4 * 8 + 3) * KERNEL
    assert kernels(setup(totals=1000, blocks=1000)) == 1024 * KERNEL  # as many as the library keeps
    assert kernels(setup(dtype="float32", totals=2)) == 0
    assert kernels(setup(dtype="float32", mixed="bfloat16", totals=2)) > 0
    assert kernels(setup(cpu=False)) == 0
