"""How ``mlflow.pyfunc.load_model`` loads an adapter or a sequence-to-sequence model that llmkit stored.

MLflow names this module in the ``MLmodel`` file and calls ``_load_pyfunc``. It is imported where the model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

MAX_NEW_TOKENS = 256


def _load_pyfunc(data_path: str) -> TextModel:
    """Load the folder; for an adapter, also its base model, from where ``adapter_config.json`` says."""
    folder = Path(data_path)
    if (folder / "adapter_config.json").exists():
        return _load_adapter(folder)
    return TextModel(AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def _load_adapter(folder: Path) -> TextModel:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    base = os.environ.get("LLMKIT_BASE_MODEL") or config.base_model_name_or_path
    if not base or (Path(base).is_absolute() and not Path(base).exists()):
        raise FileNotFoundError(
            f"the adapter's base model is not at {base}. Set LLMKIT_BASE_MODEL to where it is on this machine"
        )
    seq2seq = str(config.task_type or "").endswith("SEQ_2_SEQ_LM")
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    with_tokenizer = folder if (folder / "tokenizer_config.json").exists() else base
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    model = PeftModel.from_pretrained(kind.from_pretrained(base), str(folder))
    return TextModel(model, tokenizer, seq2seq=seq2seq)


class TextModel:
    """Text in, text out; a causal model's answer comes without its prompt."""

    def __init__(self, model: Any, tokenizer: Any, *, seq2seq: bool = True) -> None:
        self._model, self._tokenizer, self._seq2seq = model.eval(), tokenizer, seq2seq

    def predict(self, texts: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """One answer for each text. ``params`` go to ``generate``; the default is greedy, 256 new tokens at most."""
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False} | dict(params or {})
        return [self._answer(text, options) for text in _as_list(texts)]

    @torch.no_grad()
    def _answer(self, text: str, options: Mapping[str, Any]) -> str:
        ids = self._tokenizer(text, return_tensors="pt")["input_ids"]
        out = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0]
        return str(self._tokenizer.decode(out if self._seq2seq else out[ids.shape[1] :], skip_special_tokens=True))


def _as_list(texts: Any) -> list[str]:
    """A string, a list, or the one-column table that MLflow makes of either."""
    if isinstance(texts, str):
        return [texts]
    if hasattr(texts, "iloc"):
        return [str(text) for text in texts.iloc[:, 0]]
    return [str(text) for text in texts]
