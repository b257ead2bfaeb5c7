"""[18]: what is exported is reopened in a fresh process and is what was trained."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkit.errors import GateError, MissingError
from llmkit.modeling.export import atomic_folder, save_model, take_probe, verify
from llmkit.modeling.load import load_model, load_tokenizer, stop_ids
from llmkit.modeling.settings import ModelSettings, TokenizerTrainingSettings
from llmkit.modeling.verify import inspect_folder


def _loaded(source: Path, **settings: Any) -> tuple[Any, Any, tuple[int, ...]]:
    recipe = ModelSettings(name_or_path=str(source), **settings)
    tokenizer = load_tokenizer(recipe, lambda: iter(["some text to learn from, 123"] * 9))
    return load_model(recipe, tokenizer=tokenizer, seed=0), tokenizer, stop_ids(recipe, tokenizer)


def _moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.full_like(parameter, 0.01))
    return model


@pytest.mark.parametrize(
    ("source", "dtype"), [("tiny_llama", "float32"), ("tiny_qwen", "bfloat16"), ("tiny_t5", "float32")]
)
def test_an_exported_model_is_reopened_with_the_same_logits(
    source: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, tokenizer, stops = _loaded(request.getfixturevalue(source), dtype=dtype)
    _moved(model).train()
    probe = take_probe(model, tokenizer)
    assert model.training
    save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    report = verify(tmp_path / "model", probe)
    assert report.relative == 0
    assert report.dtype == dtype


def test_the_export_has_all_that_transformers_needs(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = _loaded(tiny_llama)
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    own = tokenizer.chat_template
    save_model(model, tokenizer, tmp_path / "model", stop_ids=[2, 0], chat_template=template)
    assert tokenizer.chat_template == own
    assert model.config.eos_token_id == 2
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == template
    # Issue LLaMA-Factory #7454: what ends an answer is written where every engine looks.
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "model" / name).read_text())
        assert written["eos_token_id"] == [2, 0]
        assert written["pad_token_id"] == tokenizer.pad_token_id
    ids = reopened.generate(torch.tensor([[5, 6]]), max_new_tokens=3)
    assert ids.shape[1] >= 3
    mode = (tmp_path / "model" / "model.safetensors").stat().st_mode
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(mode) == 0o666 & ~umask


def test_a_model_from_config_with_a_trained_tokenizer_is_exported(tiny_qwen: Path, tmp_path: Path) -> None:
    model, tokenizer, stops = _loaded(
        tiny_qwen,
        init="from_config",
        tokenizer=TokenizerTrainingSettings(vocab_size=320),
        config_overrides={"num_hidden_layers": 1},
    )
    assert model.config.vocab_size >= len(tokenizer)
    probe = take_probe(model, tokenizer)
    save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    verify(tmp_path / "model", probe)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()


def test_sampling_settings_that_contradict_each_other_are_still_written(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer, stops = _loaded(tiny_llama)
    model.generation_config.temperature = 0.6
    model.generation_config.top_p = 0.9
    save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.6


def _scaled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _empty(folder: Path) -> None:
    """Issue transformers #20082: ZeRO-3 weights of shape [0]."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _many_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<t{i}>" for i in range(200)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_scaled, "logits differ"), (_nan, "not finite"), (_empty, "do not fit|shapes differ"), (_missing, "k_proj"),
     (_cut, "damaged"), (_many_tokens, "rows, but its tokenizer")],
)  # fmt: skip
def test_an_export_that_is_not_what_was_trained_fails_the_run(
    tiny_llama: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    model, tokenizer, stops = _loaded(tiny_llama)
    probe = take_probe(model, tokenizer)
    folder = save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    damage(folder)
    problems, _ = inspect_folder(folder, probe)
    assert len(problems) == 1
    assert re.search(words, problems[0])


def test_a_failed_check_ends_the_run_with_the_code_of_a_gate(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer, stops = _loaded(tiny_llama)
    probe = take_probe(model, tokenizer)
    folder = save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    _scaled(folder)
    with pytest.raises(GateError, match=r"not what was trained(.|\n)*logits differ") as caught:
        verify(folder, probe)
    assert caught.value.exit_code == 4


def test_embeddings_that_should_be_tied_are_found_out(tiny_qwen: Path, tmp_path: Path) -> None:
    model, tokenizer, stops = _loaded(tiny_qwen)
    probe = take_probe(model, tokenizer)
    folder = save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    problems, _ = inspect_folder(folder, probe)
    assert "two different matrices" in problems[0]


def test_weights_that_are_not_finite_are_never_written(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer, stops = _loaded(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(MissingError, match=r"model\.norm\.weight"):
        save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    assert not any(tmp_path.iterdir())


def test_the_launchers_environment_does_not_reach_the_check(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.chdir(tmp_path)
    model, tokenizer, stops = _loaded(tiny_llama)
    probe = take_probe(model, tokenizer)
    save_model(model, tokenizer, tmp_path / "model", stop_ids=stops)
    assert verify("model", probe).relative == 0


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    (tmp_path / ".model.part-leftover").mkdir()

    def fail() -> None:
        with atomic_folder(target) as work:
            (work / "new").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "old").read_text() == "old"
    with atomic_folder(target) as work:
        (work / "new").write_text("whole")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
