"""Tokenizers: the model's own, one taken over, or one trained on the corpus; padding and stop tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.modeling.locate import find_folder
from llmkit.modeling.settings import ModelSettings, TokenizerTrainingSettings

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>", "<|endoftext|>")
_PROBE = "answer"


def load_tokenizer(
    settings: ModelSettings, corpus: Callable[[], Iterator[str]] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe, with a padding token.

    ``corpus`` gives the training text and is needed where ``settings.tokenizer`` trains one. Raises MissingError when
    the files are not there, UsageError for a choice that cannot work, DataError for an empty corpus.
    """
    wanted = settings.tokenizer
    if isinstance(wanted, TokenizerTrainingSettings):
        if settings.init != "from_config":
            raise UsageError(
                "model.tokenizer trains a new vocabulary, but model.init: pretrained keeps weights that know another one: "
                "set model.init: from_config, or take the model's own tokenizer"
            )
        if corpus is None:
            raise UsageError("model.tokenizer: a tokenizer can only be trained where there is a corpus (data.train)")
        return train_tokenizer(wanted, corpus())
    name = wanted or settings.name_or_path
    revision = settings.revision if wanted is None else None
    tokenizer = _open(name, revision, settings.trust_remote_code)
    ensure_pad_token(tokenizer)
    if wanted is not None and settings.init == "pretrained":
        _check_same_vocabulary(settings, tokenizer)
    return tokenizer


def open_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with a padding token."""
    tokenizer = _open(str(folder), None, trust_remote_code)
    ensure_pad_token(tokenizer)
    return tokenizer


def train_tokenizer(settings: TokenizerTrainingSettings, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string can be written in it. Digits are tokens of their own, which helps arithmetic.

    The first special token ends a document (eos); with ``<|im_start|>`` and ``<|im_end|>`` among them the tokenizer
    has the ChatML template. Raises DataError for a corpus without text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = list(dict.fromkeys(settings.special_tokens))
    if not specials:
        raise UsageError("model.tokenizer.special_tokens: at least one is needed, the first ends a document")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    raw.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("model.tokenizer: the corpus has no text to train a tokenizer on")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=specials[0],
        extra_special_tokens=specials[1:],
        clean_up_tokenization_spaces=False,
    )
    if {"<|im_start|>", "<|im_end|>"} <= set(specials):
        tokenizer.chat_template = CHATML
    ensure_pad_token(tokenizer)
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token out of its own vocabulary, so that no embedding has to be added.

    A token made for it is taken first; the last resort is eos. That is harmless here: llmkit masks by length, never
    by comparing with the padding token, so a real eos stays supervised.
    """
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    for name in _PAD_NAMES:
        if name in vocabulary and name != tokenizer.eos_token:
            tokenizer.pad_token = name
            return
    if tokenizer.eos_token is None:
        raise UsageError("The tokenizer has neither a padding nor an end token: it cannot be used for training")
    tokenizer.pad_token = tokenizer.eos_token


def stop_ids(
    settings: ModelSettings | None,
    tokenizer: PreTrainedTokenizerBase,
    model_dir: str | Path | None = None,
    *,
    chat_template: str | None = None,
) -> tuple[int, ...]:
    """Tokens at which generation ends: the chat template's end of turn first, then eos, then generation_config's.

    ``model_dir`` is the folder whose ``generation_config.json`` counts (default: the model of ``settings``, unless
    its weights are not used). ``chat_template`` is the one in force where it is not the tokenizer's. Never empty:
    raises UsageError for a tokenizer without any end token.
    """
    found: list[int] = []
    turn_end = _turn_end(tokenizer, chat_template)
    if turn_end is not None:
        found.append(turn_end)
    if tokenizer.eos_token_id is not None:
        found.append(int(tokenizer.eos_token_id))
    if model_dir is None and settings is not None and settings.init == "pretrained":
        model_dir = find_folder(settings.name_or_path, settings.revision)
    if model_dir is not None:
        found += [i for i in configured_stops(Path(model_dir)) if i < len(tokenizer)]
    if not found:
        raise UsageError("The tokenizer has no end token and the model names none: such a model would never stop")
    return tuple(dict.fromkeys(found))


def _open(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    folder = find_folder(name, revision, weights=False)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(
            f"No tokenizer could be opened in {folder}: {first}\n"
            "Its files are tokenizer.json (or tokenizer.model) and tokenizer_config.json; "
            "model.tokenizer names another folder to take it from"
        ) from error


def _check_same_vocabulary(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer taken over whose ordinary tokens have other numbers than the model learned."""
    try:
        own = _open(settings.name_or_path, settings.revision, settings.trust_remote_code)
    except MissingError:
        return  # a model folder without a tokenizer: there is nothing to hold the other one against
    added = set(own.get_added_vocab()) | set(tokenizer.get_added_vocab())
    ours = tokenizer.get_vocab()
    names = {index: token for token, index in ours.items()}
    for token, index in own.get_vocab().items():
        other = names.get(index)
        if token not in added and other is not None and other not in added and other != token:
            raise UsageError(
                f"model.tokenizer: {settings.tokenizer} numbers its tokens differently from {settings.name_or_path} "
                f"(token {index} is {other!r}, the model learned {token!r}), so the pretrained weights would be read wrongly. "
                "Take the model's own tokenizer, or begin anew with model.init: from_config"
            )


def _turn_end(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> int | None:
    """The special token that the template puts after an assistant's answer, found by rendering one."""
    if not (chat_template or tokenizer.chat_template):
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=chat_template)
    except Exception as error:
        raise UsageError(f"The chat template cannot render a question and an answer: {error}") from error
    after = str(text).rpartition(_PROBE)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return next((int(i) for i in tokenizer.encode(after, add_special_tokens=False) if i in special), None)


def configured_stops(folder: Path) -> list[int]:
    """The stop tokens of a model folder's ``generation_config.json``, else of its ``config.json``; empty without."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            eos: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except ValueError as error:
            raise MissingError(f"{file} is not JSON: {error}") from error
        if eos is not None:
            return [int(i) for i in eos] if isinstance(eos, list) else [int(eos)]
    return []
