"""How much arithmetic a token costs, and what a device could do at best: the two halves of MFU."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmkit.modeling.quantized import weights_of

# Dense (not sparse) bfloat16 tensor FLOP/s, from each maker's data sheet; float16 where a device has no bfloat16.
# A longer name wins over a shorter one, so that "H100 PCIe" is not taken for the SXM board.
_PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250.0,  # NVIDIA DGX B200 data sheet, half of the sparse figure
    "GH200": 989.4,  # NVIDIA GH200 data sheet
    "H200 NVL": 835.5,  # NVIDIA H200 data sheet, NVL column
    "H200": 989.4,  # NVIDIA H200 data sheet, SXM column
    "H100 NVL": 835.5,  # NVIDIA H100 data sheet, NVL column
    "H100 PCIe": 756.4,  # NVIDIA H100 PCIe product brief
    "H100": 989.4,  # NVIDIA H100 data sheet, SXM column
    "H800": 989.4,  # as H100; only its links and float64 are cut
    "H20": 148.0,  # NVIDIA H20 product table
    "A100": 312.0,  # NVIDIA A100 data sheet
    "A800": 312.0,  # as A100; only its links are cut
    "A40": 149.7,  # NVIDIA A40 data sheet
    "A30": 165.0,  # NVIDIA A30 data sheet
    "A10G": 70.0,  # NVIDIA A10G data sheet
    "A10": 125.0,  # NVIDIA A10 data sheet
    "RTX A6000": 154.8,  # NVIDIA RTX A6000 data sheet
    "L40S": 362.0,  # NVIDIA L40S data sheet
    "L40": 181.0,  # NVIDIA L40 data sheet
    "L4": 121.0,  # NVIDIA L4 data sheet
    "T4": 65.0,  # NVIDIA T4 data sheet, float16
    "V100": 125.0,  # NVIDIA V100 data sheet, float16
    "RTX 6000 Ada": 182.1,  # NVIDIA Ada architecture paper, float32 accumulation
    "RTX 5090": 209.5,  # NVIDIA Blackwell RTX architecture paper, float32 accumulation
    "RTX 4090": 165.2,  # NVIDIA Ada architecture paper, float32 accumulation
    "RTX 4080": 97.5,  # NVIDIA Ada architecture paper, float32 accumulation
    "RTX 3090": 71.0,  # NVIDIA Ampere GA102 architecture paper, float32 accumulation
    "MI300X": 1307.4,  # AMD Instinct MI300X data sheet
    "MI325X": 1307.4,  # AMD Instinct MI325X data sheet
    "MI250X": 383.0,  # AMD Instinct MI250X data sheet, both dies
}


def peak_flops(device_name: str) -> float | None:
    """Best bfloat16 FLOP/s of a device by the name that its driver gives; None where it is not known (every CPU)."""
    words = f" {device_name.replace('-', ' ').replace('_', ' ')} "
    known = [name for name in _PEAK_TFLOPS if f" {name} " in words]
    if not known or " Laptop " in words:
        return None
    return _PEAK_TFLOPS[max(known, key=len)] * 1e12


def flops_per_token(model: PreTrainedModel, length: int, *, supervised: float = 1.0) -> float:
    """Floating-point operations of one training step (forward and backward) for one token in a row of ``length``.

    PaLM, appendix B (arXiv 2204.02311): 6 for each weight that a token is multiplied with, and ``12·L·H·Q·T`` for the
    attention of L layers with H heads of size Q over T tokens, not halved for the causal mask, as is customary.
    Three things are counted more closely than there. Looking up an embedding is no arithmetic. The output layer
    counts for the ``supervised`` share of the tokens, as llmkit computes it only there. A frozen weight costs 4, for
    it gets no gradient of its own.
    """
    output = model.get_output_embeddings()
    head = None if output is None else output.weight
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    total = 0.0
    for parameter in model.parameters():
        cost = float(weights_of(parameter) * (6 if parameter.requires_grad else 4))
        if parameter is head:
            total += supervised * cost
        elif parameter.ndim == 3:
            total += cost * _active_experts(model.config)
        elif parameter.ndim == 2 and id(parameter) not in lookups:
            total += cost
    return total + _attention(model.config, length)


def _active_experts(config: Any) -> float:
    """Share of a mixture's experts that a token passes through; 1 for a model without experts."""
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    active = getattr(text, "num_experts_per_tok", None)
    return float(active) / float(experts) if experts and active else 1.0


def _attention(config: Any, length: int) -> float:
    """The product of queries, keys and values: 12·L·H·Q·T, the backward pass included."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers = int(text.num_hidden_layers)
    if text.is_encoder_decoder:
        # The decoder attends twice, to itself and to the encoder.
        layers += 2 * int(getattr(text, "num_decoder_layers", None) or layers)
    return 12.0 * layers * heads * size * length
