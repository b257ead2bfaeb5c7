"""Images and texts in one space: tiny random models of the real architectures, against transformers' own forward."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.errors import DataError, UsageError
from llmkit.inference.embedding.embedder import Embedder
from llmkit.inference.embedding.images import PairEmbedder, VisionLanguageEmbedder, image_key, read_image
from llmkit.inference.embedding.settings import EmbeddingSettings
from tests.inference.embedding.conftest import word_tokenizer

TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXTS = ["a gift card", "무선 이어폰", "where is my phone", "a gift card"]
SETTINGS = EmbeddingSettings(image="image", on_too_long="error")


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    made = {}
    size = {"height": 32, "width": 32}
    clip_images = {"size": {"shortest_edge": 32}, "crop_size": size}
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "clip": (CLIPModel, CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16), CLIPImageProcessorPil(**clip_images)),
        "siglip": (SiglipModel, SiglipConfig(text_config=TEXT, vision_config=VISION), SiglipImageProcessorPil(size=size)),
    }  # fmt: skip
    for name, (kind, config, processor) in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(4)
        kind(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        word_tokenizer(folder)
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("llava")
    word_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(**TEXT | {"max_position_embeddings": 128, "num_key_value_heads": 2})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=image_token,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(5)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from PIL import Image

    drawn = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pictures")
    for i, mode in enumerate(["RGB", "L", "RGBA"]):
        shape = (40 + i, 30) if mode == "L" else (40 + i, 30, len(mode))
        Image.fromarray(drawn.integers(0, 255, shape, dtype=np.uint8), mode).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_two_towers_give_transformers_vectors(two_towers: dict[str, Path], pictures: list[Path], name: str) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = two_towers[name]
    embed = PairEmbedder(str(folder), SETTINGS)
    found_texts, found_images = embed(TEXTS), embed(images=[str(path) for path in pictures])
    assert found_texts.shape[1] == found_images.shape[1] == (16 if name == "clip" else 32)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    padding = {"padding": "max_length", "max_length": 24} if name == "siglip" else {}
    with torch.inference_mode():
        for text, vector in zip(TEXTS, found_texts, strict=True):
            ids = tokenizer(text, return_tensors="pt", **padding)["input_ids"]
            expected = model.get_text_features(input_ids=ids).pooler_output[0]
            assert np.allclose(expected / expected.norm(), vector, atol=1e-5)
        for path, vector in zip(pictures, found_images, strict=True):
            pixels = processor(images=read_image(str(path)), return_tensors="pt")["pixel_values"]
            expected = model.get_image_features(pixel_values=pixels).pooler_output[0]
            assert np.allclose(expected / expected.norm(), vector, atol=1e-5)
    for row, path in enumerate(pictures):  # alone, and from the file's bytes
        assert np.allclose(embed(images=[path.read_bytes()])[0], found_images[row], atol=1e-5)


def test_a_row_has_its_images_vector_or_its_texts(two_towers: dict[str, Path], pictures: list[Path]) -> None:
    embed = PairEmbedder(str(two_towers["clip"]), SETTINGS)
    mixed = embed([*TEXTS[:2], "is not read"], [None, None, str(pictures[0])])
    assert np.allclose(mixed[:2], embed(TEXTS[:2]), atol=1e-6)
    assert np.allclose(mixed[2], embed(images=[str(pictures[0])])[0], atol=1e-6)


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_a_vision_language_model_makes_one_vector_of_both(llava: Path, pictures: list[Path], pooling: Any) -> None:
    from transformers import AutoModel, AutoProcessor

    texts: list[Any] = ["a gift card", "where is my phone", None, "a gift card"]
    images: list[Any] = [str(pictures[0]), None, str(pictures[1]), str(pictures[2])]
    embed = VisionLanguageEmbedder(str(llava), EmbeddingSettings(image="image", pooling=pooling))
    found = embed(texts, images)
    model, processor = AutoModel.from_pretrained(llava).eval(), AutoProcessor.from_pretrained(llava, backend="pil")
    for text, image, vector in zip(texts, images, found, strict=True):
        words = ("<image>" if image else "") + (text or "")
        picture = {"images": read_image(image)} if image else {}
        with torch.inference_mode():
            hidden = model(**processor(text=words, **picture, return_tensors="pt")).last_hidden_state[0]
        expected = hidden[-1] if pooling == "auto" else hidden.mean(0)
        assert np.allclose(expected / expected.norm(), vector, atol=1e-5)
    assert abs(float(found[0] @ found[3])) < 0.9999  # the image counts


def test_rows_without_a_vector_say_why(two_towers: dict[str, Path], llava: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not an image")
    embed = PairEmbedder(str(two_towers["clip"]), SETTINGS.model_copy(update={"image_root": str(tmp_path)}))
    found = embed.prepare([None, None, None, "a " * 40], ["x.png", "y.png", 3, None])
    reasons = [getattr(one, "reason", "") for one in found]
    assert "the image cannot be read" in reasons[0]
    assert "there is no image" in reasons[1]
    assert "expected the path or the bytes" in reasons[2]
    assert "more than max_length 24" in reasons[3]
    (neither,) = VisionLanguageEmbedder(str(llava), SETTINGS).prepare([None], [None])
    assert "neither a text nor an image" in getattr(neither, "reason", "")
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be embedded: row 0: there is no image"):
        embed(images=["y.png"])
    with pytest.raises(UsageError, match="one for images"):
        Embedder(str(two_towers["clip"]))


def test_images_come_as_paths_bytes_or_hugging_faces_mapping(pictures: list[Path]) -> None:
    content = pictures[0].read_bytes()
    shapes = {
        np.asarray(read_image(value)).tobytes()
        for value in (str(pictures[0]), content, {"bytes": content, "path": None}, {"path": str(pictures[0])})
    }
    assert len(shapes) == 1
    assert np.asarray(read_image(io.BytesIO(content).read())).shape[2] == 3
    assert image_key(content) == image_key({"bytes": content}) != image_key(str(pictures[0]))
