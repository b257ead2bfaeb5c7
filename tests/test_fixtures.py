"""The shared fixtures are what they say: models of the named architecture that load, and tokenizers that round-trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.errors import LlmkitError


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen", "tiny_t5"])
def test_tiny_models_load_and_their_tokenizers_round_trip(name: str, request: pytest.FixtureRequest) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    folder: Path = request.getfixturevalue(name)
    kind = AutoModelForSeq2SeqLM if name == "tiny_t5" else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "한국어, 中文 and naïve English\n\t12 + 24 = 36"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    ids = torch.tensor([tokenizer.encode(text)])
    logits = (model(input_ids=ids, labels=ids) if name == "tiny_t5" else model(input_ids=ids)).logits
    assert logits.shape[:2] == ids.shape
    assert torch.isfinite(logits).all()
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_chat_models_close_a_turn_with_their_stop_token(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.encode(text)[-2] == tokenizer.eos_token_id


def test_the_command_line_runs_in_a_process_of_its_own(run_llmkit) -> None:
    done = run_llmkit("no-such-stage")
    assert done.code == 2, done.stderr
    assert "no-such-stage" in done.stderr
    assert LlmkitError.__name__ not in done.stderr
