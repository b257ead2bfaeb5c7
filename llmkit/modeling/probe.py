"""A fixed question to a model: its logits on a few tokens, to hold a saved, reopened or merged model against.

Shared by the exporting process and by the fresh one that reopens the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.modeling.load import plain_attention
from llmkit.modeling.quantized import weights_of

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

ROWS, LENGTH = 2, 16
TEXT = (
    "The capital of France is Paris, and 12 times 4 is 48. Question: how does a compiler read a program? Answer: "
    "it splits the text into words, builds a tree from them, and turns that tree into instructions. def add(a, b): return a + b"
)
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest relative difference (:func:`difference`) between a model and its copy on the same device, by type of the
weights. Equal weights and equal kernels give 0; a layer that is missing or random gives about 1."""
OTHER_DEVICE = 4.0
"""Factor on the tolerance where the kernels differ, and with them the rounding of every layer."""


@dataclass(frozen=True)
class Probe:
    """``input_ids`` [rows, length]; ``logits`` [rows, length, vocabulary]; for an encoder-decoder the same ids go to both.

    ``slack`` multiplies the tolerance: an adapter whose weights are rewritten for the export is rounded once more.
    """

    input_ids: Ids
    logits: Logits
    dtype: str
    device: str
    slack: float = 1.0

    def save(self, file: Path) -> None:
        kind = np.array([self.dtype, self.device, str(self.slack)])
        np.savez(file, input_ids=self.input_ids, logits=self.logits, kind=kind)

    @classmethod
    def load(cls, file: Path) -> Probe:
        with np.load(file) as data:
            dtype, device, slack = (str(value) for value in data["kind"])
            return cls(data["input_ids"], data["logits"], dtype, device, float(slack))


@dataclass(frozen=True)
class Difference:
    """``relative``: root mean square of the difference over that of the reference around its mean; ``largest``: in logits."""

    relative: float
    largest: float


def take_probe(model: Any, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """Ask ``model`` (a PreTrainedModel or PeftModel) about a fixed text in the tokens of ``tokenizer``.

    The model's mode, attention and random state are left as they were. Shapes: see :class:`Probe`.
    """
    slack = OTHER_DEVICE if getattr(model, "_llmkit_initial_adapter", None) is not None else 1.0
    device = str(next(model.parameters()).device.type)
    ids = probe_ids(tokenizer)
    return Probe(ids, logits_of(model, ids), dtype_name(model), device, slack)


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The text's tokens [rows, length]; repeated where a tokenizer has very long ones."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return np.resize(np.asarray(ids, dtype=np.int64), (ROWS, LENGTH))


def logits_of(model: Any, input_ids: Ids) -> Logits:
    """Logits as float32 [rows, length, vocabulary], without dropout and without a gradient."""
    bare: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    ids = torch.from_numpy(input_ids).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if bare.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), plain_attention(bare):
            logits = model(**inputs, use_cache=False).logits
    finally:
        model.train(training)
    return logits.float().cpu().numpy()  # type: ignore[no-any-return]


def difference(reference: Logits, other: Logits) -> Difference:
    """How far two logits are apart; infinite where one is not finite. Padding rows beyond the shorter are left out."""
    width = min(reference.shape[-1], other.shape[-1])
    a, b = reference[..., :width].astype(np.float64), other[..., :width].astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(float("inf"), float("inf"))
    spread = float(np.sqrt(np.mean((a - a.mean(axis=-1, keepdims=True)) ** 2)))
    gap = float(np.sqrt(np.mean((a - b) ** 2)))
    return Difference(gap / spread if spread else gap, float(np.abs(a - b).max()))


def tolerance(dtype: str, *, slack: float = 1.0) -> float:
    return slack * TOLERANCE.get(dtype, TOLERANCE["bfloat16"])


def dtype_name(model: Any) -> str:
    """Type of most of the weights, e.g. ``bfloat16``; an adapter's float32 weights do not outvote their base's.

    Quantized weights count as what they were loaded as.
    """
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        dtype = parameter.dtype if parameter.is_floating_point() else model.config.dtype
        name = str(dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + weights_of(parameter)
    return max(sizes, key=lambda name: sizes[name])
