"""Small real tokenizers of every family that the data tests meet, and a progress display that remembers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "user assistant system tool What is the capital of France? The capital of France is Paris.",
    "You are helpful. A spider has eight legs. 2 + 2 = 4. <<48/2=24>>24 clips in May.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "one\n\ntwo\n\nthree\n\nfour\n\n\n\n  Paris ris\n\n",
    "한국어 문장도 있습니다. 中文句子也在这里。 <think> </think> <tool_call> </tool_call>",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
    "+ '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Like Qwen3: the last answer carries its (perhaps empty) thinking, earlier ones lose theirs.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# How Llama 3 and Qwen cut words: unlike GPT-2, they keep line ends together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(
    specials: Sequence[str],
    *,
    bos: str | None,
    eos: str | None,
    pad: str | None,
    template: str | None,
    adds_bos: bool,
    words: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2 (without ``words``), Llama 3 and Qwen have."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words:
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(specials), initial_alphabet=alphabet)
    raw.train_from_iterator(CORPUS, trainer)
    if adds_bos and bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(template: str | None, scheme: str = "first") -> PreTrainedTokenizerFast:
    """A tokenizer that puts a blank before a text, as Llama 2 and Mistral 7B do; it adds bos by itself."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    raw.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback()])
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def t5_like() -> PreTrainedTokenizerFast:
    """A unigram tokenizer that ends every text with eos, as T5's does."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


_IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]

MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": lambda: byte_level(_IM, bos=None, eos="<|im_end|>", pad="<|im_end|>", template=CHATML, adds_bos=False),
    "chatml_generation": lambda: byte_level(
        _IM, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=CHATML_GENERATION, adds_bos=False
    ),
    "chatml_base_eos": lambda: byte_level(
        _IM, bos=None, eos="<|endoftext|>", pad="<|endoftext|>", template=CHATML, adds_bos=False
    ),
    "llama3": lambda: byte_level(
        _LLAMA3, bos=_LLAMA3[0], eos=_LLAMA3[1], pad=_LLAMA3[1], template=LLAMA3, adds_bos=True, words=WORDS
    ),
    "gemma": lambda: byte_level(
        _GEMMA, bos="<bos>", eos="<eos>", pad="<pad>", template=GEMMA, adds_bos=True, words=WORDS
    ),
    "mistral": lambda: sentencepiece_like(MISTRAL),
    "mistral_always": lambda: sentencepiece_like(MISTRAL, "always"),
    "thinking": lambda: byte_level(
        _IM, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=THINKING, adds_bos=False, words=WORDS
    ),
    "base": lambda: byte_level(
        ["<|endoftext|>"], bos=None, eos="<|endoftext|>", pad=None, template=None, adds_bos=False
    ),
    "t5": t5_like,
}
CHAT = ["chatml", "chatml_generation", "chatml_base_eos", "llama3", "gemma", "mistral", "mistral_always"]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """A tokenizer by name; the same object for the same name."""
    made: dict[str, PreTrainedTokenizerFast] = {}

    def make(name: str) -> PreTrainedTokenizerFast:
        if name not in made:
            made[name] = MAKERS[name]()
        return made[name]

    return make


class Recorder:
    """A progress display that keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, what: str, total: int | None = None, unit: str = "rows") -> Iterator[Any]:
        self.tasks.append(what)

        class Task:
            def advance(self, n: int = 1) -> None:
                assert n > 0

        yield Task()

    def step(self, step: int, total: int, metrics: Any) -> None:
        raise AssertionError("data preparation has no steps")

    log = step


@pytest.fixture
def progress() -> Recorder:
    return Recorder()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSONL file in ``tmp_path``; gives its path."""

    def write(rows: Sequence[object], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
