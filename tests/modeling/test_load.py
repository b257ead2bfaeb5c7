"""Models are loaded whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.flops import flops_per_token, peak_flops
from llmkit.modeling.load import count_parameters, is_seq2seq, load_config, load_model, load_tokenizer
from llmkit.modeling.settings import ModelSettings


def _load(path: Path, **settings: Any) -> Any:
    recipe = ModelSettings(name_or_path=str(path), **settings)
    return load_model(recipe, tokenizer=load_tokenizer(recipe), seed=0)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "tiny-llama"))


def _edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_architecture_is_loaded_by_its_kind(tiny_llama: Path, tiny_qwen: Path, tiny_t5: Path) -> None:
    assert type(_load(tiny_llama)).__name__ == "LlamaForCausalLM"
    assert type(_load(tiny_qwen)).__name__ == "Qwen3ForCausalLM"
    assert type(_load(tiny_t5)).__name__ == "T5ForConditionalGeneration"
    assert is_seq2seq(ModelSettings(name_or_path=str(tiny_t5)))
    assert not is_seq2seq(ModelSettings(name_or_path=str(tiny_qwen)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_is_the_one_asked_for(tiny_qwen: Path, dtype: str) -> None:
    model = _load(tiny_qwen, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_missing_layers_are_never_filled_with_random_numbers(copy: Path) -> None:
    _edit_weights(copy, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(MissingError, match=r"model.layers.1.mlp.up_proj.weight"):
        _load(copy)


def test_left_over_weights_are_refused(copy: Path) -> None:
    _edit_weights(copy, lambda w: w.update({"model.layers.7.extra": torch.zeros(2)}))
    with pytest.raises(MissingError, match=r"no place in the model: model.layers.7.extra"):
        _load(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(MissingError, match=r"config.json"):
        _load(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(copy: Path, value: float) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = value

    _edit_weights(copy, damage)
    with pytest.raises(MissingError, match=r"not finite.*layers.0.self_attn.q_proj"):
        _load(copy)


def test_a_model_that_writes_no_text_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UsageError, match="clip model is not a language model"):
        _load(copy)


def test_quantized_weights_are_not_trained(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UsageError, match="quantized"):
        _load(copy)


def test_an_attention_kernel_that_is_not_installed_is_missing(tiny_llama: Path) -> None:
    with pytest.raises(MissingError, match="flash_attention_2"):
        _load(tiny_llama, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen", "tiny_t5"])
def test_new_tokens_get_rows_and_tied_embeddings_stay_tied(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """[21], issues LLaMA-Factory #6749, peft #2898."""
    source: Path = request.getfixturevalue(name)
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(source)))
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    old = _load(source)
    model = _load(source, tokenizer=str(tmp_path))
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows >= len(tokenizer) > old.get_input_embeddings().weight.shape[0]
    assert model.config.vocab_size == rows == model.get_output_embeddings().weight.shape[0]
    tied = model.config.tie_word_embeddings
    assert tied == old.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    before = old.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: before.shape[0]], before)


def test_a_padding_row_that_is_also_eos_is_trained(tiny_llama: Path) -> None:
    """[5]: torch gives the padding row of an embedding no gradient."""
    settings = ModelSettings(name_or_path=str(tiny_llama))
    tokenizer = load_tokenizer(settings)
    tokenizer.pad_token = tokenizer.eos_token
    model = load_model(settings, tokenizer=tokenizer, seed=0)
    ids = torch.tensor([[tokenizer.eos_token_id, 5, 6]])
    model(ids).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_from_config_is_random_by_seed_and_leaves_the_random_state(tiny_llama: Path) -> None:
    settings = ModelSettings(
        name_or_path=str(tiny_llama), init="from_config", config_overrides={"num_hidden_layers": 3}
    )
    tokenizer = load_tokenizer(settings)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = load_model(settings, tokenizer=tokenizer, seed=1)
    assert torch.equal(torch.rand(3), expected)
    same, other = (load_model(settings, tokenizer=tokenizer, seed=seed) for seed in (1, 2))
    weights = [m.model.layers[2].mlp.up_proj.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.config.vocab_size >= len(tokenizer)
    assert one.config.eos_token_id == tokenizer.eos_token_id
    assert one.dtype == torch.float32
    assert one.get_input_embeddings().weight[tokenizer.pad_token_id].abs().sum() > 0


def test_overrides_that_are_not_keys_are_all_named(tiny_llama: Path) -> None:
    overrides = {"num_hiden_layers": 2, "zzz": 1, "vocab_size": 9}
    settings = ModelSettings(name_or_path=str(tiny_llama), init="from_config", config_overrides=overrides)
    with pytest.raises(UsageError) as caught:
        load_config(settings)
    message = str(caught.value)
    assert "Did you mean num_hidden_layers?" in message
    assert "zzz: a llama configuration has no such key" in message
    assert "vocab_size: it follows the tokenizer" in message


@pytest.mark.parametrize("overrides", [{"hidden_size": "wide"}, {"hidden_size": 62}])
def test_overrides_of_a_wrong_value_are_refused(tiny_llama: Path, overrides: dict[str, Any]) -> None:
    settings = ModelSettings(name_or_path=str(tiny_llama), init="from_config", config_overrides=overrides)
    with pytest.raises(UsageError, match="config_overrides"):
        load_model(settings, tokenizer=load_tokenizer(settings), seed=0)


def test_overrides_on_pretrained_weights_are_refused(tiny_llama: Path) -> None:
    settings = ModelSettings(name_or_path=str(tiny_llama)).model_copy(
        update={"config_overrides": {"num_hidden_layers": 1}}
    )
    with pytest.raises(UsageError, match="from_config"):
        load_config(settings)


def test_parameters_and_flops_are_counted(tiny_llama: Path, tiny_qwen: Path, tiny_t5: Path) -> None:
    llama, qwen = _load(tiny_llama), _load(tiny_qwen)
    count = count_parameters(llama)
    assert count.all == count.trainable == llama.num_parameters()
    assert count.embedding == llama.config.vocab_size * 64
    products = sum(p.numel() for n, p in llama.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert flops_per_token(llama, 100) == pytest.approx(6 * products + 12 * 2 * 64 * 100)
    # A tied matrix is looked up and multiplied with: it counts once, as the output layer.
    inner = sum(p.numel() for n, p in qwen.named_parameters() if p.ndim == 2 and "embed" not in n)
    head = qwen.config.vocab_size * 64
    assert flops_per_token(qwen, 100, supervised=0.5) == pytest.approx(6 * inner + 3 * head + 12 * 2 * 64 * 100)
    llama.requires_grad_(False)
    assert count_parameters(llama).trainable == 0
    assert flops_per_token(llama, 100) == pytest.approx(4 * products + 12 * 2 * 64 * 100)
    assert flops_per_token(_load(tiny_t5), 100) > 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.4), ("NVIDIA A100-SXM4-80GB", 312.0), ("Tesla T4", 65.0),
     ("NVIDIA L40S", 362.0), ("NVIDIA L4", 121.0), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA H200", 989.4)],
)  # fmt: skip
def test_peaks_of_known_devices(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name", ["AMD EPYC 9354", "Intel(R) Xeon(R) Platinum 8481C", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name) is None
