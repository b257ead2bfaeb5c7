"""Tokenizers: padding without touching eos, stop tokens, taking over, training on a corpus."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.modeling.load import load_tokenizer, stop_ids
from llmkit.modeling.settings import ModelSettings, TokenizerTrainingSettings
from llmkit.modeling.tokenizer import ensure_pad_token

TEXTS = ["def add(a, b): return a + b", "한국어 문장, 中文句子, and 12345 digits.", "The quick brown fox."] * 5


def _corpus() -> Iterator[str]:
    yield from TEXTS


def _scratch(tiny_llama: Path, **tokenizer: object) -> ModelSettings:
    return ModelSettings(
        name_or_path=str(tiny_llama),
        init="from_config",
        tokenizer=TokenizerTrainingSettings(vocab_size=400, **tokenizer),
    )


def test_a_trained_tokenizer_writes_and_reads_everything(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(_scratch(tiny_llama), _corpus)
    for text in (*TEXTS, "unseen: ☃ Ж \n\t"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= 400
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id is not None
    # Digits are tokens of their own.
    assert len(tokenizer.encode("12345")) == 5
    turns = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert turns == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens(list(stop_ids(_scratch(tiny_llama), tokenizer))) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]


def test_a_trained_tokenizer_is_the_same_every_time(tiny_llama: Path) -> None:
    first, second = (load_tokenizer(_scratch(tiny_llama), _corpus) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_training_a_tokenizer_needs_text_and_new_weights(tiny_llama: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        load_tokenizer(_scratch(tiny_llama), lambda: iter([]))
    with pytest.raises(UsageError, match="corpus"):
        load_tokenizer(_scratch(tiny_llama))
    pretrained = _scratch(tiny_llama).model_copy(update={"init": "pretrained"})
    with pytest.raises(UsageError, match="from_config"):
        load_tokenizer(pretrained, _corpus)


def test_padding_takes_a_token_made_for_it_and_leaves_eos(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(tiny_llama)))
    tokenizer.pad_token = None
    rows = len(tokenizer)
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", rows)


def test_stop_tokens_are_the_turn_end_eos_and_the_configured_ones(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    settings = ModelSettings(name_or_path=str(folder))
    tokenizer = load_tokenizer(settings)
    ids = stop_ids(settings, tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["<|im_end|>", "<|endoftext|>"]


def test_a_base_model_learns_the_turn_end_of_its_template(tiny_llama: Path) -> None:
    """[5], issue LLaMA-Factory #7454: the base's eos is not what ends a chat turn."""
    settings = ModelSettings(name_or_path=str(tiny_llama), init="from_config")
    tokenizer = load_tokenizer(settings)
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(list(stop_ids(settings, tokenizer))) == ["<|im_end|>", "<|endoftext|>"]


def test_a_tokenizer_with_other_numbers_is_refused(tiny_llama: Path, tiny_t5: Path) -> None:
    settings = ModelSettings(name_or_path=str(tiny_llama), tokenizer=str(tiny_t5))
    with pytest.raises(UsageError, match="numbers its tokens differently"):
        load_tokenizer(settings)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MissingError, match="No tokenizer could be opened"):
        load_tokenizer(ModelSettings(name_or_path=str(tmp_path)))
