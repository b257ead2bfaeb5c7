"""Embeddings against transformers and sentence-transformers: the same vectors, alone, in a batch, by any way of computing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.inference.embedding.backbone import open_backbone
from llmkit.inference.embedding.embedder import Embedder
from llmkit.inference.embedding.encoder import Encoder
from llmkit.inference.embedding.folder import read_folder
from llmkit.inference.embedding.settings import EmbeddingModelSettings, EmbeddingSettings
from tests.inference.embedding.conftest import edit_json

TEXTS = [
    "where is my gift card", "how many legs has a spider", "a", "무선 이어폰 价格", "where is my gift card",
    "the bank of the card where is my phone how many legs has a spider the a card bank of how many", "耳机",
]  # fmt: skip
COSINE = 0.99999


def cosines(a: Any, b: Any) -> np.ndarray:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def reference(folder: Path, texts: list[str], mode: str) -> np.ndarray:
    """Each text alone, by transformers' forward."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = model(input_ids=ids).last_hidden_state[0]
            found.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}[mode])
    return torch.stack(found).numpy()


@pytest.mark.parametrize(
    ("name", "padding_free"), [("bert", True), ("roberta", True), ("distilbert", True), ("modernbert", True)]
)
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_an_encoder_gives_transformers_vectors(
    encoder_folder: Callable[[str], Path], name: str, padding_free: bool, mode: Any
) -> None:
    folder = encoder_folder(name)
    embed = Embedder(str(folder), EmbeddingSettings(pooling=mode, normalize=False))
    found = embed(TEXTS)
    assert embed.encoder.padding_free is padding_free
    expected = reference(folder, TEXTS, mode)
    assert cosines(found, expected).min() > COSINE
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen", "tiny_t5"])
@pytest.mark.parametrize("mode", ["last", "mean"])
def test_decoders_and_t5_encoders_give_transformers_vectors(
    request: pytest.FixtureRequest, fixture: str, mode: Any
) -> None:
    folder = request.getfixturevalue(fixture)
    embed = Embedder(str(folder), EmbeddingSettings(pooling=mode))
    found = embed(TEXTS)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert embed.encoder.padding_free is (fixture != "tiny_t5")
    assert cosines(found, reference(folder, TEXTS, mode)).min() > COSINE


def test_alone_in_a_batch_and_padded_on_either_side_a_text_has_one_vector(tiny_llama: Path) -> None:
    embed = Embedder(str(tiny_llama))
    together = embed(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert np.allclose(embed([text])[0], vector, atol=1e-5)
    ids = [x for x in embed.tokens(TEXTS) if isinstance(x, np.ndarray)]
    model = open_backbone(read_folder(str(tiny_llama)), torch.float32)
    padded = Encoder(model, ("last",), padding_free=False)
    assert not padded.padding_free
    assert cosines(padded.encode(ids), together).min() > COSINE
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, padding_side="left")
    with torch.inference_mode():
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        left = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state[:, -1]
    assert cosines(left, together).min() > COSINE


def test_rows_longer_than_a_sliding_window_are_right_too(encoder_folder: Callable[[str], Path]) -> None:
    folder = encoder_folder("modernbert")
    texts = ["the card of the bank where is my gift phone how many legs has a spider " * 2, "a card"]
    embed = Embedder(str(folder), EmbeddingSettings(pooling="mean", normalize=False))
    assert len(embed.tokens(texts)[0]) > 16  # type: ignore[arg-type]
    assert np.allclose(embed(texts), reference(folder, texts, "mean"), atol=1e-4)


@pytest.mark.parametrize("mode", ["last", "mean", "cls", "max", "weighted_mean"])
def test_a_shared_beginning_is_computed_once_and_changes_nothing(tiny_qwen: Path, mode: Any) -> None:
    prompt = "Instruct: Find the product that the customer means, whatever the language is\nQuery: "
    texts = [f"{text} {number}" for number in range(4) for text in TEXTS]
    settings = EmbeddingSettings(prompt=prompt, pooling=mode)
    embed = Embedder(str(tiny_qwen), settings)
    found = embed(texts)
    ids = [x for x in embed.tokens(texts) if isinstance(x, np.ndarray)]
    every = sum(len(x) for x in {x.tobytes(): x for x in ids}.values())
    assert embed.encoder.share_prefix
    assert embed.encoder.tokens < every / 2
    plain = Encoder(open_backbone(read_folder(str(tiny_qwen)), torch.float32), (mode,), share_prefix=False)
    assert cosines(plain.encode(ids), found).min() > COSINE
    assert plain.tokens == every


def test_equal_texts_are_computed_once(tiny_llama: Path) -> None:
    embed = Embedder(str(tiny_llama))
    embed(["a gift card"])
    once = embed.encoder.tokens
    found = embed(["a gift card"] * 50)
    assert embed.encoder.tokens == 2 * once
    assert (found == found[0]).all()


@pytest.mark.parametrize(
    "make",
    [
        {"pooling": "mean"}, {"pooling": "cls", "normalize": False}, {"pooling": ["mean", "max"], "dense": True},
        {"pooling": "lasttoken"}, {"pooling": "weightedmean", "dense": True, "normalize": False},
        {"pooling": "mean_sqrt_len_tokens"}, {"prompts": {"query": "how many of"}, "include_prompt": False},
        {"prompts": {"query": "where is"}, "default_prompt_name": "query"},
    ],
    ids=lambda make: "-".join(f"{k}={v}" for k, v in make.items())[:60],
)  # fmt: skip
def test_a_sentence_transformers_folder_gives_its_own_vectors(
    sentence_folder: Callable[..., Path], make: dict[str, Any]
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = sentence_folder(**make)
    name = "query" if make.get("prompts") else None
    found = Embedder(str(folder), EmbeddingSettings(prompt_name=name))(TEXTS)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name=name)
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=2e-5)


def test_a_prompt_counts(sentence_folder: Callable[..., Path]) -> None:
    folder = sentence_folder(prompts={"query": "where is"}, default_prompt_name="query")
    default, without = (Embedder(str(folder), EmbeddingSettings(prompt=prompt))(TEXTS) for prompt in (None, ""))
    assert cosines(default, without).min() < 0.999
    with pytest.raises(UsageError, match="no prompt passage; it has query"):
        Embedder(str(folder), EmbeddingSettings(prompt_name="passage"))


@pytest.mark.parametrize("fixture", ["tiny_llama", "bert"])
@pytest.mark.parametrize("layer", [1, -2])
def test_layers_above_the_wanted_one_are_cut(
    request: pytest.FixtureRequest, encoder_folder: Callable[[str], Path], fixture: str, layer: int
) -> None:
    folder = encoder_folder("bert") if fixture == "bert" else request.getfixturevalue(fixture)
    embed = Embedder(str(folder), EmbeddingSettings(layer=layer, pooling="mean", normalize=False))
    found = embed(TEXTS)
    whole = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = whole.config.num_hidden_layers
    wanted = layer if layer > 0 else count + 1 + layer
    assert embed.encoder.model.config.num_hidden_layers == wanted < count
    with torch.inference_mode():
        for text, vector in zip(TEXTS, found, strict=True):
            states = whole(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            assert np.allclose(states[wanted][0].mean(0), vector, atol=1e-4)


def test_a_layer_that_is_not_there(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="layer: 9 is not there: the model has 2 layers"):
        Embedder(str(tiny_llama), EmbeddingSettings(layer=9))(["a"])


def test_fewer_dimensions_are_normalized_anew(tiny_llama: Path) -> None:
    whole = Embedder(str(tiny_llama))(TEXTS)
    short = Embedder(str(tiny_llama), EmbeddingSettings(truncate_dim=16))(TEXTS)
    assert short.shape == (len(TEXTS), 16)
    assert np.allclose(short, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(UsageError, match="truncate_dim: the vectors have 64"):
        Embedder(str(tiny_llama), EmbeddingSettings(truncate_dim=65))(["a"])


def test_bfloat16_stays_near(minilm: Path) -> None:
    texts = [*TEXTS, "I lost my card, what can I do?"]
    full = Embedder(EmbeddingModelSettings(name_or_path=str(minilm), dtype="float32"))(texts)
    half = Embedder(EmbeddingModelSettings(name_or_path=str(minilm), dtype="bfloat16"))
    assert half.encoder.model.dtype is torch.bfloat16
    assert half.encoder.padding_free
    assert cosines(half(texts), full).min() > 0.999


@pytest.mark.parametrize("dtype", ["adapter", "run"])
def test_an_adapter_is_merged_into_its_base(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    kind = AutoModelForCausalLM if dtype == "run" else AutoModel
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        task_type=TaskType.CAUSAL_LM if dtype == "run" else TaskType.FEATURE_EXTRACTION,
    )  # fmt: skip
    model = get_peft_model(kind.from_pretrained(tiny_llama, dtype=torch.float32), config)
    folder = tmp_path / "run" / "adapter" if dtype == "run" else tmp_path / "lora"
    model.save_pretrained(folder)
    named = folder.parent if dtype == "run" else folder
    found = Embedder(str(named))(TEXTS)
    inner = model.base_model.model.model if dtype == "run" else model.base_model.model
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.inference_mode():
        expected = [inner(**tokenizer(t, return_tensors="pt")).last_hidden_state[0, -1].numpy() for t in TEXTS]
    assert cosines(found, expected).min() > COSINE
    assert cosines(found, Embedder(str(tiny_llama))(TEXTS)).min() < 0.999


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_refused_cut_or_left_out(tiny_llama: Path) -> None:
    long = "the card " * 40
    with pytest.raises(DataError, match=r"text 1: the text has \d+ tokens, more than max_length 16"):
        Embedder(str(tiny_llama), EmbeddingSettings(max_length=16))(["a", long])
    cut = Embedder(str(tiny_llama), EmbeddingSettings(max_length=16, on_too_long="truncate"))
    cut(["a", long])
    assert cut.tokens.truncated == 1
    assert [len(ids) for ids in cut.tokens([long])] == [16]  # type: ignore[arg-type]
    (dropped,) = Embedder(str(tiny_llama), EmbeddingSettings(max_length=16, on_too_long="drop")).tokens([long])
    assert not isinstance(dropped, np.ndarray)
    assert dropped.dropped
    with pytest.raises(UsageError, match="max_length: 9,999 is more than the model's"):
        Embedder(str(tiny_llama), EmbeddingSettings(max_length=9999))


def test_no_text_is_a_reason(tiny_llama: Path) -> None:
    found = Embedder(str(tiny_llama)).tokens(["a", None, 3, ""])
    reasons = [getattr(one, "reason", "") for one in found]
    assert reasons == ["", "there is no text", "expected a text, got int", "the text is empty"]


def test_folders_that_cannot_be_used(
    sentence_folder: Callable[..., Path], copy_of: Callable[[Path], Path], encoder_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(MissingError, match="no folder no/such/embedder/model"):
        Embedder("no/such/embedder/model")
    folder = sentence_folder()
    modules = folder / "modules.json"
    kept = modules.read_text(encoding="utf-8")
    modules.write_text(kept.replace(".Normalize", ".Sparse"), encoding="utf-8")
    with pytest.raises(UsageError, match="it has a module Sparse; llmkit knows Transformer"):
        Embedder(str(folder))
    modules.write_text("{}", encoding="utf-8")
    with pytest.raises(MissingError, match="no list of modules"):
        Embedder(str(folder))
    broken = copy_of(encoder_folder("bert"))
    edit_json(broken / "config.json", num_hidden_layers=5)
    with pytest.raises(MissingError, match="would be random numbers"):
        Embedder(str(broken))(["a"])
