"""Turn texts and images into vectors, millions of rows at a time: ``llmkit embed recipe.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from llmkit.context import Result, RunContext
from llmkit.inference.batch.settings import BatchRecipe
from llmkit.inference.embedding.settings import EmbeddingModelSettings, EmbeddingSettings, ExportSettings
from llmkit.recipe import Conflict


class Recipe(BatchRecipe):
    """Embed the rows of files into Parquet shards: encoders, decoders, sentence-transformers folders, T5, CLIP, vision-language models."""

    not_here: ClassVar[Mapping[str, str]] = {
        "data": "here it is `input`",
        "train": "an embedding model is not trained here; its rows are in `input`",
        "adapter": "name the adapter's folder, or its run, as `model.name_or_path`: it is merged into its base",
        "prompt": "here it is `embedding.prompt`",
        "prompt_name": "here it is `embedding.prompt_name`",
        "batch_size": "here it is `embedding.batch_tokens`: batches are made by tokens, not by rows",
        "normalize_embeddings": "here it is `embedding.normalize`",
        "pooling_mode": "here it is `embedding.pooling`",
        "precision": "here it is `embedding.precision`",
        "truncate_dim": "here it is `embedding.truncate_dim`",
        "max_seq_length": "here it is `embedding.max_length`",
    }

    model: EmbeddingModelSettings
    """The model that embeds."""
    embedding: EmbeddingSettings = EmbeddingSettings()
    """How a row becomes a vector."""
    export: ExportSettings = ExportSettings()
    """Further forms of the finished output."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.export.faiss is not None and self.embedding.precision == "int8":
            yield Conflict(
                "export.faiss", "an index of int8 codes would compare codes, not vectors",
                "keep `float16`, or make the index from `vectors.npy` with its ranges", ("embedding.precision",),
            )  # fmt: skip


def check_against(recipe: Recipe, library: str) -> str:
    """``--check-against LIBRARY``: the cosines between llmkit's vectors of the first rows and another library's.

    Raises GateError where they are not the same.
    """
    from itertools import islice

    from llmkit.errors import GateError
    from llmkit.inference.batch.reading import rows_of
    from llmkit.inference.embedding.check import ROWS, compare

    column = recipe.embedding.text or ""  # images alone: ``compare`` says that it compares texts
    texts = [row.get(column) for row in islice(rows_of(recipe.input), ROWS)]
    found = compare(recipe.model, recipe.embedding, [text for text in texts if isinstance(text, str)], library)
    if not found.same:
        raise GateError(f"llmkit and {library}: {found}")
    return f"llmkit and {library}: {found}"


def run(recipe: Recipe, ctx: RunContext) -> Result:
    from llmkit.inference.batch.run import run_batch
    from llmkit.inference.embedding.export import check_installed, export

    check_installed(recipe.export)
    report = run_batch(recipe, ctx, "embed")
    binary = recipe.embedding.precision == "binary"
    made = export(report.shards, recipe.embedding.column, ctx.output_dir, recipe.export, binary=binary)
    return Result(
        stage="embed", name=recipe.name, output_dir=ctx.output_dir, metrics=report.metrics,
        artifacts={**report.artifacts, **made},
    )  # fmt: skip
