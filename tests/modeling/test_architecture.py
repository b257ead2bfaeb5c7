"""What is read of a model without loading it, held against the model that transformers builds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.architecture import needs_torch, read_architecture, tokenizer_size
from llmkit.modeling.settings import ModelSettings, TokenizerTrainingSettings


def model(folder: Path, **kwargs: object) -> ModelSettings:
    return ModelSettings.model_validate({"name_or_path": str(folder), **kwargs})


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen", "tiny_t5"])
def test_headers_say_what_the_model_holds(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = request.getfixturevalue(name)
    found = read_architecture(model(folder))
    kind = AutoModelForSeq2SeqLM if name == "tiny_t5" else AutoModelForCausalLM
    loaded = kind.from_pretrained(folder)
    assert found.source == "safetensors headers"
    assert found.parameters == sum(p.numel() for p in loaded.parameters())
    assert found.embedding == loaded.get_input_embeddings().weight.numel()
    assert found.seq2seq == (name == "tiny_t5")
    assert found.dtype == "float32"
    linear = {
        n for n, m in loaded.named_modules() if type(m).__name__ == "Linear" and m is not loaded.get_output_embeddings()
    }
    assert {t.module for t in found.linears} == linear


def test_sizes(tiny_llama: Path, tiny_qwen: Path) -> None:
    llama, qwen = read_architecture(model(tiny_llama)), read_architecture(model(tiny_qwen))
    assert (llama.hidden, llama.inner, llama.layers, llama.heads, llama.kv_heads, llama.head_dim) == (
        64,
        128,
        2,
        4,
        2,
        16,
    )
    assert (llama.queries, llama.keys, llama.tied, llama.qk_norm, llama.swiglu, llama.lean_norm) == (
        64,
        32,
        False,
        False,
        True,
        True,
    )
    assert qwen.tied
    assert qwen.qk_norm
    assert not llama.changes_logits


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen"])
def test_a_configuration_alone_gives_the_same_shapes(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    found, whole = read_architecture(model(alone)), read_architecture(model(folder))
    assert found.source == "config.json"
    assert sorted(t.shape for t in found.tensors) == sorted(t.shape for t in whole.tensors)
    assert {t.name for t in found.tensors} == {t.name for t in whole.tensors}


def test_random_weights_follow_overrides_and_tokenizer(tiny_llama: Path) -> None:
    fresh = {"init": "from_config", "config_overrides": {"num_hidden_layers": 3, "intermediate_size": 256}}
    found = read_architecture(model(tiny_llama, **fresh))
    assert (found.layers, found.inner) == (3, 256)
    assert found.vocabulary == -(-tokenizer_size(tiny_llama) // 64) * 64
    trained = TokenizerTrainingSettings(vocab_size=1000)
    assert read_architecture(model(tiny_llama, **fresh, tokenizer=trained)).vocabulary == 1024


def test_an_architecture_that_is_not_known_is_built_without_memory(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64,
        "architectures": ["GPT2LMHeadModel"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = model(tmp_path)
    assert needs_torch(settings)
    found = read_architecture(settings)
    layer = (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 4 * 32
    assert found.parameters == 100 * 32 + 64 * 32 + 2 * layer + 2 * 32
    assert (found.gated, found.lean_norm) == (False, False)


def test_torch_is_not_imported_for_a_folder_with_weights(tiny_llama: Path) -> None:
    code = (
        "import sys\nfrom llmkit.modeling.architecture import read_architecture\n"
        "from llmkit.modeling.settings import ModelSettings\n"
        f"assert read_architecture(ModelSettings(name_or_path={str(tiny_llama)!r})).parameters > 0\n"
        "print([m for m in ('torch', 'transformers', 'safetensors', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_cannot_be_read(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(MissingError, match="no folder"):
        read_architecture(model(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(MissingError, match="does not begin with a safetensors header"):
        read_architecture(model(broken))
    (broken / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(MissingError, match="it has 3 bytes"):
        read_architecture(model(broken))
    (broken / "config.json").write_text('{"model_type": "llama"}')
    shutil.copy(tiny_llama / "model.safetensors", broken)
    with pytest.raises(UsageError, match="names no hidden size"):
        read_architecture(model(broken))
