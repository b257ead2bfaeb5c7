"""Settings of what is embedded, how, and in which form vectors are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmkit.recipe import Conflict, Settings

Pooling = Literal["auto", "mean", "cls", "last", "max", "mean_sqrt_len", "weighted_mean"]
TooLong = Literal["error", "truncate", "drop"]
Precision = Literal["float32", "float16", "int8", "binary"]


class EmbeddingModelSettings(Settings):
    """The model that embeds: an encoder, a decoder, a sentence-transformers folder, a T5, a CLIP, a vision-language model."""

    name_or_path: Annotated[str, Field(min_length=1)]
    """A model folder, a hub id, or the output folder of a run; an adapter is merged into its base."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the computation; ``auto`` is bfloat16 where the hardware multiplies it (GPUs, CPUs with AMX or AVX512-bf16), else float32. Vectors are pooled in float32 all the same."""
    device: str | None = None
    """Device, e.g. ``cuda:1``; None takes a GPU where there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class EmbeddingSettings(Settings):
    """How a row becomes a vector. What is None or ``auto`` follows the model's own folder where that says so."""

    free_text: ClassVar[frozenset[str]] = frozenset({"prompt"})
    not_here: ClassVar[Mapping[str, str]] = {
        "batch_size": "batches are made by tokens, not by rows: `batch_tokens`",
        "normalize_embeddings": "here it is `normalize`",
        "pooling_mode": "here it is `pooling`",
        "prompts": "one prompt for all rows: `prompt`, or `prompt_name` of the model's folder",
        "max_seq_length": "here it is `max_length`",
        "output_dtype": "here it is `precision`",
        "show_progress_bar": "progress is always shown",
        "device": "here it is `model.device`",
        "convert_to_numpy": "vectors are kept in Parquet; `export.npy` makes a file for numpy of them",
    }

    text: str | None = "text"
    """Column of the text; None where only images are embedded."""
    image: str | None = None
    """Column of the image: a path or the file's bytes. A two-tower model (CLIP, SigLIP) gives a row the vector of its image, or of its text where there is no image; a vision-language model makes one vector of both."""
    image_root: str | None = None
    """Folder that relative paths of images begin from; None is the working directory."""
    prompt: str | None = None
    """Put before every text, e.g. ``"Instruct: Find the product that is meant\\nQuery: "``; computed once for causal models."""
    prompt_name: str | None = None
    """Name of a prompt in the sentence-transformers folder instead, e.g. ``query``."""
    pooling: Pooling = "auto"
    """One vector out of the tokens' states; ``auto`` follows the folder, else it is ``last`` for causal models and ``mean`` for others."""
    layer: int | None = None
    """Take the states above this layer, from 1, or from the end by -1; layers above it are not computed. None is the last."""
    normalize: bool | None = None
    """Unit length. None follows a sentence-transformers folder, and is True for any other model."""
    truncate_dim: Annotated[int, Field(ge=1)] | None = None
    """Keep the first so many dimensions (Matryoshka), normalized anew where vectors are of unit length."""
    precision: Precision = "float32"
    """Type of the vectors that are kept. ``int8`` maps each dimension's range to -128…127, ``binary`` keeps signs, eight a byte."""
    calibration_rows: Annotated[int, Field(ge=2)] = 2000
    """Rows from the input's beginning by whose lowest and highest values the ranges of ``int8`` are set; they are kept in ``int8_ranges.npy``."""
    int8_ranges: str | None = None
    """File with ranges ``[2, dim]`` of an earlier run (``int8_ranges.npy``), so that two sets of vectors can be compared."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Longest text in tokens, prompt and special tokens included; None takes the folder's, the tokenizer's or the model's."""
    on_too_long: TooLong = "error"
    """A longer text: ``error`` puts it among the bad rows, ``truncate`` cuts it, ``drop`` leaves it out; each is counted."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that go through the model at once; None is 2,048 on a CPU, 16,384 on a GPU."""
    column: Annotated[str, Field(min_length=1)] = "embedding"
    """Column of the vectors in the output."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.text is None and self.image is None:
            yield Conflict("text", "there is nothing to embed", "name a column of texts, or `image`")
        if self.text is not None and self.text == self.image:
            yield Conflict("image", f"{self.image} is the column of the text too", also=("text",))
        if self.image is None and self.image_root is not None:
            yield Conflict("image_root", "is for images", "name their column as `image`", ("image",))
        if self.column in (self.text, self.image):
            yield Conflict("column", f"{self.column} is the column of the input", "choose another name")
        if self.prompt is not None and self.prompt_name is not None:
            yield Conflict("prompt_name", "there is a `prompt` too", "remove one of them", ("prompt",))
        if self.layer == 0:
            yield Conflict("layer", "layers are counted from 1, or from the end by -1")
        if self.precision == "binary" and self.truncate_dim is not None and self.truncate_dim % 8:
            yield Conflict("truncate_dim", "has to be a multiple of 8 for `binary`", also=("precision",))
        if self.int8_ranges is not None and self.precision != "int8":
            yield Conflict("int8_ranges", "is for `precision: int8`", "remove the line", ("precision",))
        default = type(self).model_fields["calibration_rows"].default
        if self.precision != "int8" and self.calibration_rows != default:
            yield Conflict("calibration_rows", "is for `precision: int8`", "remove the line", ("precision",))


class ExportSettings(Settings):
    """Further forms of the finished output, for vector databases and feature stores, beside the Parquet shards."""

    npy: bool = False
    """All vectors as one ``vectors.npy`` that numpy can map into memory; ``vectors_keys.parquet`` has the other columns in the same order."""
    lance: bool = False
    """A Lance dataset ``vectors.lance`` with all columns (extra ``lance``)."""
    faiss: Literal["flat", "hnsw", "ivf"] | None = None
    """A FAISS index ``vectors.faiss`` by inner product, ``binary`` by Hamming distance (extra ``faiss``); positions are those of ``vectors_keys.parquet``."""

    features_by_day: str | None = None
    """Column of a timestamp or an ISO date: all columns as a Parquet data set ``features/day=2026-11-27/…``, as feature stores read it. The column has to be carried along."""
