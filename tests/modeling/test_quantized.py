"""Quantized bases: whatever was asked of them before, they multiply and learn by the weights that they were loaded with."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit.errors import MissingError, UsageError
from llmkit.modeling import quantized
from llmkit.modeling.adapters import attach, load_adapter, merge_run
from llmkit.modeling.export import save_adapter, take_probe
from llmkit.modeling.flops import flops_per_token
from llmkit.modeling.load import count_parameters, load_model, load_tokenizer, open_model
from llmkit.modeling.locate import BaseInfo, describe_base
from llmkit.modeling.probe import difference, dtype_name, logits_of, probe_ids, tolerance
from llmkit.modeling.settings import AdapterSettings, ModelSettings, QuantizationSettings
from llmkit.modeling.verify import inspect_folder

KINDS: list[Any] = ["nf4", "int8", QuantizationSettings(type="nf4", double_quant=False, compute_dtype="float32")]


def _load(folder: Path, kind: Any, dtype: Any = "bfloat16") -> Any:
    recipe = ModelSettings(name_or_path=str(folder), dtype=dtype, quantization=kind)
    return load_model(recipe, tokenizer=load_tokenizer(recipe), seed=0)


def _bitsandbytes_own(folder: Path, kind: str) -> Any:
    """The same model as transformers and bitsandbytes load and run it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def _ids(folder: Path) -> Any:
    return probe_ids(load_tokenizer(ModelSettings(name_or_path=str(folder))))


def _fingerprint(model: nn.Module) -> str:
    """Of every quantized weight with its scales."""
    whole = hashlib.sha256()
    for layer in (m for m in model.modules() if quantized.is_quantized(m)):
        state = getattr(layer.weight, "quant_state", None)
        for tensor in (layer.weight.data, layer.weight.SCB if state is None else state.absmax):
            whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _loss(model: Any, ids: Any) -> Tensor:
    tokens = torch.from_numpy(ids)
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_quantized_model_is_smaller_and_nearly_the_model(tiny_qwen: Path, kind: Any) -> None:
    plain, model = open_model(tiny_qwen, dtype="bfloat16"), _load(tiny_qwen, kind)
    ids = _ids(tiny_qwen)
    assert difference(logits_of(plain, ids), logits_of(model, ids)).relative < (0.03 if kind == "int8" else 0.3)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(quantized.is_quantized(m) for m in model.modules()) == 14
    assert count_parameters(model).all == count_parameters(plain).all
    assert flops_per_token(model.requires_grad_(False), 64) == flops_per_token(plain.requires_grad_(False), 64)
    assert quantized.memory_of(plain) == 2 * count_parameters(plain).all
    assert quantized.memory_of(model) < 0.75 * quantized.memory_of(plain)
    assert dtype_name(model) == "bfloat16"


def test_double_quantization_saves_most_of_the_scales(tiny_llama: Path) -> None:
    once = quantized.memory_of(_load(tiny_llama, QuantizationSettings(type="nf4", double_quant=False)))
    twice = quantized.memory_of(_load(tiny_llama, "nf4"))
    linear = sum(
        quantized.weights_of(m.weight) for m in _load(tiny_llama, "nf4").modules() if quantized.is_quantized(m)
    )  # type: ignore[arg-type]
    assert once - twice == pytest.approx(linear / 64 * 3, rel=0.1)  # 4 bytes for 64 weights become 1, and some more


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_weights_are_those_that_bitsandbytes_makes_and_reads(tiny_llama: Path, kind: str) -> None:
    """Its own layers, in training mode, are the oracle: there they dequantize and multiply."""
    ours, theirs = _load(tiny_llama, kind), _bitsandbytes_own(tiny_llama, kind)
    ids = _ids(tiny_llama)
    with torch.no_grad():
        reference = theirs.train()(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    assert difference(reference, logits_of(ours, ids)).relative < 1e-2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_changes_neither_weights_nor_gradients(tiny_llama: Path, kind: str) -> None:
    """Held-out loss and sample answers come before training: bitsandbytes' own 4-bit layers are ruined by them on a CPU."""
    ids = _ids(tiny_llama)
    gradients = []
    for asked_before in (False, True):
        model = attach(_load(tiny_llama, kind), AdapterSettings(r=4, init_lora_weights="gaussian"), seed=1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        before = _fingerprint(model)
        if asked_before:
            model.eval()
            with torch.inference_mode():
                model(input_ids=torch.from_numpy(ids))
        assert _fingerprint(model) == before
        _loss(model.train(), ids).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 28
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(bool(g.any()) for g in gradients[0])


def test_bitsandbytes_still_rewrites_its_weights_in_evaluation(tiny_llama: Path) -> None:
    """Why the product is ours. Once this fails, bitsandbytes has mended it: see docs/decisions/quantized-products.md."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes does so on CPUs with AVX512-bf16 only")
    model = _bitsandbytes_own(tiny_llama, "nf4").eval()
    before = model.model.layers[0].mlp.up_proj.weight.data.clone()
    with torch.no_grad():
        model(input_ids=torch.from_numpy(_ids(tiny_llama)))
    assert not torch.equal(before.flatten(), model.model.layers[0].mlp.up_proj.weight.data.flatten())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradient_are_those_of_the_dequantized_weight(
    tiny_qwen: Path, kind: Any, dtype: torch.dtype
) -> None:
    layer = _load(tiny_qwen, kind).model.layers[0].mlp.up_proj
    weight = quantized.dequantized(layer, torch.float32)
    assert weight.shape == (128, 64)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for multiply in (layer, lambda leaf: leaf.float() @ weight.t()):
        leaf = x.to(dtype).requires_grad_()
        out = multiply(leaf)
        outcomes.append((out, *torch.autograd.grad(out.float().square().sum(), leaf)))
    assert outcomes[0][0].dtype == dtype
    for ours, written_out in zip(*outcomes, strict=True):
        assert (
            float((ours.detach().float() - written_out.detach().float()).norm() / written_out.detach().float().norm())
            < 2e-2
        )


def test_checkpointed_activations_give_the_same_gradients(tiny_llama: Path) -> None:
    """Without PEFT's prepare_model_for_kbit_training: non-reentrant checkpointing needs no gradient of the input."""
    found = []
    for checkpointing in (False, True):
        model = attach(_load(tiny_llama, "nf4"), AdapterSettings(r=4), seed=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _loss(model, _ids(tiny_llama)).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _run(folder: Path, run: Path, kind: Any, **adapter: Any) -> Any:
    """A finished QLoRA run in ``run``: three real steps, saved. Gives the model and its tokenizer."""
    recipe = ModelSettings(name_or_path=str(folder), dtype="bfloat16", quantization=kind)
    tokenizer = load_tokenizer(recipe)
    base = load_model(recipe, tokenizer=tokenizer, seed=0)
    model = attach(base, AdapterSettings(**{"r": 4} | adapter), seed=3)
    ids = torch.arange(3, 35).reshape(2, 16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    info = describe_base(recipe, rows=int(base.config.get_text_config().vocab_size), dtype=dtype_name(model))
    save_adapter(model, tokenizer, run / "adapter", info, stop_ids=[tokenizer.eos_token_id])
    return model, tokenizer


@pytest.mark.parametrize(
    ("source", "kind", "adapter"),
    [
        ("tiny_qwen", "nf4", {}),
        ("tiny_llama", "int8", {"use_rslora": True}),
        ("tiny_llama", KINDS[2], {"modules_to_save": ["lm_head"]}),
        ("tiny_qwen", "nf4", {"use_dora": True}),
        ("tiny_llama", "int8", {"use_dora": True}),
        ("tiny_t5", "nf4", {}),
    ],
    ids=str,
)
def test_a_saved_adapter_answers_alike_on_the_base_quantized_anew(
    source: str, kind: Any, adapter: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """[18]"""
    folder: Path = request.getfixturevalue(source)
    model, tokenizer = _run(folder, tmp_path, kind, **adapter)
    probe = take_probe(model, tokenizer)
    untouched = logits_of(_load(folder, kind), probe.input_ids)
    assert difference(untouched, probe.logits).relative > 2 * tolerance("bfloat16"), "the adapter changes nothing"
    problems, report = inspect_folder(tmp_path / "adapter", probe)
    assert problems == []
    assert report["relative"] < 1e-3
    info = BaseInfo.read(tmp_path / "adapter")
    assert info is not None
    assert info.quantized == ModelSettings(name_or_path="x", quantization=kind).quantized


def test_merging_goes_into_the_unquantized_base_and_says_so(tiny_qwen: Path, tmp_path: Path) -> None:
    """[20]"""
    _, tokenizer = _run(tiny_qwen, tmp_path, "nf4")
    report = merge_run(tmp_path)
    assert report.quantization == "nf4 in training; merged into the unquantized base"
    assert Path(report.base) == tiny_qwen and report.difference < report.tolerance
    whole, _, _ = load_adapter(tmp_path / "adapter", dtype="float32")
    ids = probe_ids(tokenizer)
    assert not any(quantized.is_quantized(m) for m in whole.modules())
    merged = open_model(tmp_path / "merged")
    assert difference(logits_of(whole, ids), logits_of(merged, ids)).relative < tolerance("float32")


def test_it_answers_over_the_base_of_its_training(tiny_qwen: Path, tmp_path: Path) -> None:
    from llmkit.inference.generate import load_for_inference

    trained, tokenizer = _run(tiny_qwen, tmp_path, "nf4")
    ids = probe_ids(tokenizer)
    as_trained, _ = load_for_inference(tmp_path)
    assert difference(logits_of(trained, ids), logits_of(as_trained, ids)).relative < 1e-3
    assert as_trained.generation_config.eos_token_id == tokenizer.eos_token_id  # type: ignore[union-attr]
    whole, _ = load_for_inference(tmp_path, dtype="bfloat16")
    assert not any(quantized.is_quantized(m) for m in whole.modules())


def test_what_is_quantized_cannot_be_trained_in_full(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"modules_to_save: 'mlp' is quantized"):
        attach(_load(tiny_llama, "nf4"), AdapterSettings(modules_to_save=["mlp"]))


def test_damage_is_found_before_quantizing_hides_it(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingError, match=r"not finite.*layers.1.mlp.up_proj"):
        _load(folder, "nf4")


def test_the_package_is_asked_for_by_its_extra(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"llmkit\[quantize\]"):
        _load(tiny_llama, "nf4")


def test_a_model_that_was_saved_quantized_is_refused_with_the_way_out(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "saved-quantized"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="name the unquantized model"):
        _load(folder, "nf4")
