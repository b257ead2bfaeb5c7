"""Adapters: what gets one, what is saved, and that a merged model is the unmerged one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.adapters import attach, linear_layers, load_adapter, merge_run, merge_weights
from llmkit.modeling.export import save_adapter, save_model, take_probe, verify
from llmkit.modeling.load import count_parameters, load_model, load_tokenizer, open_model
from llmkit.modeling.locate import describe_base, model_digest
from llmkit.modeling.probe import difference, logits_of, tolerance
from llmkit.modeling.settings import AdapterSettings, ModelSettings
from llmkit.modeling.verify import inspect_folder

# tiny_qwen has tied embeddings, tiny_llama has not.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("tiny_qwen", {"use_dora": True}),
    ("tiny_qwen", {"modules_to_save": ["embed_tokens"]}),
    ("tiny_qwen", {"modules_to_save": ["lm_head"], "use_dora": True}),
    ("tiny_qwen", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("tiny_llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("tiny_llama", {"use_rslora": True, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}),
    ("tiny_llama", {"target_modules": r".*layers\.0\..*(up|v)_proj"}),
    ("tiny_llama", {"init_lora_weights": "pissa"}),
    ("tiny_qwen", {"init_lora_weights": "olora"}),
]


def _train_a_little(model: Any) -> None:
    """Three real steps, so that every trainable weight has moved the way training moves it."""
    ids = torch.arange(3, 35).reshape(2, 16)
    labels = {"labels": ids}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, **labels).loss.backward()
        optimizer.step()


def _run(source: Path, folder: Path, settings: AdapterSettings, **model: Any) -> tuple[Any, Any, Path]:
    """A finished adapter run in ``folder``: the trained model, its tokenizer, the run."""
    recipe = ModelSettings(name_or_path=str(source), **model)
    tokenizer = load_tokenizer(recipe)
    base = load_model(recipe, tokenizer=tokenizer, seed=0)
    rows = open_model(source).get_input_embeddings().weight.shape[0]
    dtype = str(base.dtype).removeprefix("torch.")
    peft_model = attach(base, settings, seed=3)
    _train_a_little(peft_model)
    info = describe_base(recipe, rows=rows, dtype=dtype)
    save_adapter(peft_model, tokenizer, folder / "adapter", info, stop_ids=[tokenizer.eos_token_id])
    return peft_model, tokenizer, folder


@pytest.mark.parametrize(("source", "kind"), KINDS)
def test_saved_reopened_and_merged_adapters_answer_alike(
    source: str, kind: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """[20], [21], issues peft #2321, #2898 and unsloth-zoo #810: DoRA, tied embeddings, modules trained in full."""
    folder: Path = request.getfixturevalue(source)
    settings = AdapterSettings(**{"r": 4, "lora_alpha": 8.0} | kind)
    peft_model, tokenizer, run = _run(folder, tmp_path / "run", settings)
    probe = take_probe(peft_model, tokenizer)
    bare = logits_of(open_model(folder), probe.input_ids)
    assert difference(probe.logits, bare).relative > 3 * tolerance("float32"), (
        "the adapter changes nothing, so the test shows nothing"
    )

    reopened, _, _ = load_adapter(run / "adapter")
    assert difference(probe.logits, logits_of(reopened, probe.input_ids)).relative < tolerance("float32")

    # The parts of merge_run, without its fresh process; the command itself is run below.
    save_model(merge_weights(reopened), tokenizer, run / "merged", stop_ids=[tokenizer.eos_token_id])
    assert inspect_folder(run / "merged", probe)[0] == []
    merged = open_model(run / "merged")
    tied = merged.config.tie_word_embeddings
    assert tied == open_model(folder).config.tie_word_embeddings
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied


def test_merging_in_bfloat16_leaves_the_rotary_frequencies_in_float32(tiny_llama: Path, tmp_path: Path) -> None:
    """As a fresh load has them: rounded ones moved the demo model's merged logits by 5.8 %, and its answers in chat."""
    _run(tiny_llama, tmp_path, AdapterSettings(r=4), dtype="bfloat16")
    kept = merge_weights(load_adapter(tmp_path / "adapter", dtype="bfloat16")[0])
    fresh = dict(open_model(tiny_llama, dtype="bfloat16").named_buffers())
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    found = dict(kept.named_buffers())
    assert found.keys() == fresh.keys() and found
    assert all(torch.equal(found[name], fresh[name]) and found[name].dtype == torch.float32 for name in fresh)


def test_merging_a_run_leaves_a_complete_model_and_says_which_base(tiny_qwen: Path, tmp_path: Path) -> None:
    """[20]"""
    settings = AdapterSettings(r=4, use_dora=True, modules_to_save=["lm_head"])
    peft_model, tokenizer, run = _run(tiny_qwen, tmp_path / "run", settings)
    probe = take_probe(peft_model, tokenizer)
    report = merge_run(run)
    assert report.base_checked
    assert (Path(report.base), report.output, report.dtype) == (tiny_qwen, str(run / "merged"), "float32")
    assert report.base_digest == model_digest(tiny_qwen)
    assert report.difference < report.tolerance < report.effect
    merged = open_model(run / "merged")
    assert difference(probe.logits, logits_of(merged, probe.input_ids)).relative < tolerance("float32")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "config.json"):
        assert (run / "merged" / name).is_file()
    assert json.loads((run / "merged" / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_an_encoder_decoder_gets_an_adapter_and_is_merged(tiny_t5: Path, tmp_path: Path) -> None:
    peft_model, tokenizer, run = _run(tiny_t5, tmp_path / "run", AdapterSettings(r=4))
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    probe = take_probe(peft_model, tokenizer)
    merge_run(run)
    assert difference(probe.logits, logits_of(open_model(run / "merged"), probe.input_ids)).relative < tolerance(
        "float32"
    )


def test_a_bfloat16_base_keeps_float32_adapters_and_its_type_after_merging(tiny_qwen: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = open_model(tiny_qwen, dtype="bfloat16")
    model.save_pretrained(base)
    load_tokenizer(ModelSettings(name_or_path=str(tiny_qwen))).save_pretrained(base)
    peft_model, tokenizer, run = _run(base, tmp_path / "run", AdapterSettings(r=4))
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}
    hidden = {}

    def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
        hidden["type"] = output.dtype

    peft_model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(look)
    report_in_process = verify(run / "adapter", take_probe(peft_model, tokenizer))
    assert hidden["type"] == torch.bfloat16
    assert report_in_process.relative == 0
    report = merge_run(run)
    assert report.dtype == "bfloat16"
    assert report.difference < report.tolerance
    assert {p.dtype for p in open_model(run / "merged").parameters()} == {torch.bfloat16}


def test_added_tokens_travel_with_the_adapter(tiny_qwen: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(tiny_qwen)))
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(100)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = AdapterSettings(r=4, modules_to_save=["embed_tokens"])
    peft_model, _, run = _run(tiny_qwen, tmp_path / "run", settings, tokenizer=str(tmp_path / "tokenizer"))
    probe = take_probe(peft_model, tokenizer)
    merge_run(run)
    merged = open_model(run / "merged")
    assert merged.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert difference(probe.logits, logits_of(merged, probe.input_ids)).relative < tolerance("float32")


def test_added_tokens_travel_even_where_the_embedding_is_frozen(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(tiny_llama)))
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(100)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    peft_model, _, run = _run(tiny_llama, tmp_path / "run", AdapterSettings(r=4), tokenizer=str(tmp_path / "tokenizer"))
    probe = take_probe(peft_model, tokenizer)
    reopened, _, _ = load_adapter(run / "adapter")
    assert difference(probe.logits, logits_of(reopened, probe.input_ids)).relative < tolerance("float32")


def test_only_the_adapter_is_trained(tiny_llama: Path) -> None:
    recipe = ModelSettings(name_or_path=str(tiny_llama))
    model = load_model(recipe, tokenizer=load_tokenizer(recipe), seed=0)
    everything = count_parameters(model).all
    peft_model = attach(model, AdapterSettings(r=2), seed=0)
    count = count_parameters(peft_model)
    assert count.all - everything == count.trainable
    assert 0 < count.trainable < everything / 5


def test_the_seed_decides_the_adapter_and_the_random_state_is_left(tiny_llama: Path) -> None:
    recipe = ModelSettings(name_or_path=str(tiny_llama))
    tokenizer = load_tokenizer(recipe)

    def first(seed: int) -> torch.Tensor:
        model = attach(load_model(recipe, tokenizer=tokenizer, seed=0), AdapterSettings(r=2), seed=seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n).detach()

    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(first(1), first(1))
    assert torch.equal(torch.rand(2), expected)
    assert not torch.equal(first(1), first(2))


def test_names_that_match_nothing_are_all_named_with_the_layers_that_exist(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    with pytest.raises(UsageError) as caught:
        attach(model, AdapterSettings(target_modules=["q_prj", "query", "lm_head", "v_proj"]))
    message = str(caught.value)
    assert "'q_prj' matches no layer. Did you mean q_proj?" in message
    assert "'query'" in message
    assert "'lm_head'" in message
    assert "modules_to_save" in message
    assert ", ".join(linear_layers(model)) in message
    assert linear_layers(model) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize("pattern", ["nothing_like_this", "(", r".*(q_proj|embed_tokens)"])
def test_patterns_that_cannot_work_are_refused(tiny_llama: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match="target_modules"):
        attach(open_model(tiny_llama), AdapterSettings(target_modules=pattern))


def test_modules_to_save_have_to_exist(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"modules_to_save: 'head' matches no layer(.|\n)*lm_head"):
        attach(open_model(tiny_llama), AdapterSettings(modules_to_save=["head"]))


def test_an_adapter_is_not_merged_into_another_base(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    _, _, run = _run(base, tmp_path / "run", AdapterSettings(r=2))
    model = open_model(base)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    model.save_pretrained(base)
    with pytest.raises(MissingError, match="is not the model that the adapter"):
        merge_run(run)
    shutil.rmtree(base)
    with pytest.raises(MissingError, match="base model is not at"):
        merge_run(run)
    assert not (run / "merged").exists()


def test_a_merged_folder_is_not_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    _, _, run = _run(tiny_llama, tmp_path / "run", AdapterSettings(r=2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not overwritten"):
        merge_run(run, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_runs_without_an_adapter_say_so(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no adapter/"):
        merge_run(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "model")
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_run(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone", "config", "nan"])
def test_a_damaged_adapter_is_refused(tiny_llama: Path, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    _, _, run = _run(tiny_llama, tmp_path / "run", AdapterSettings(r=2))
    weights = run / "adapter" / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "gone":
        weights.unlink()
    elif damage == "config":
        (run / "adapter" / "adapter_config.json").write_text("{")
    else:
        tensors = load_file(weights)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, weights)
    with pytest.raises(MissingError):
        merge_run(run)


def test_an_adapter_with_missing_layers_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, _, run = _run(tiny_llama, tmp_path / "run", AdapterSettings(r=2))
    weights = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    with pytest.raises(MissingError, match="does not fit its base"):
        load_adapter(run / "adapter")


def test_random_weights_are_no_base(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="from_config"):
        describe_base(ModelSettings(name_or_path=str(tiny_llama), init="from_config"), rows=1, dtype="float32")
