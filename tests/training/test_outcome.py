"""What a run shows of its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmkit.training.outcome import _question


def test_a_sample_shows_what_the_user_said_last(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    talk = [
        {"role": "system", "content": "a long text that says who the model is"},
        {"role": "user", "content": "two?"},
    ]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert _question(np.array(ids), tokenizer) == "two?"
    assert _question(np.array(tokenizer("plain text")["input_ids"]), tokenizer) == "plain text"
