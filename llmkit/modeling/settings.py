"""Settings of ``model:`` and ``adapter:``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.recipe import Conflict, Settings


class TokenizerTrainingSettings(Settings):
    vocab_size: Annotated[int, Field(ge=300)] = 32_000
    """Size of the byte-level BPE vocabulary trained on ``data.train``, special tokens included."""
    special_tokens: list[str] = Field(default_factory=lambda: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    """Special tokens; the first ends a document."""

    def conflicts(self) -> Iterator[Conflict]:
        if not self.special_tokens:
            yield Conflict("special_tokens", "is empty: the first special token ends a document")
        if "" in self.special_tokens or len(set(self.special_tokens)) < len(self.special_tokens):
            yield Conflict("special_tokens", "holds an empty token, or one twice")


class QuantizationSettings(Settings):
    """How the frozen weights under an adapter are kept (QLoRA, arXiv 2305.14314), by bitsandbytes."""

    type: Literal["nf4", "int8"]
    """``nf4``: 4 bits, values spread as a normal distribution is; ``int8``: 8 bits, one scale for each output."""
    double_quant: bool = True
    """Quantize the scales of ``nf4`` too: 4.13 instead of 4.5 bits a weight."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type in which ``nf4`` weights are multiplied; ``float16`` for GPUs without bfloat16. ``int8`` uses the input's type."""

    def conflicts(self) -> Iterator[Conflict]:
        for key in ("double_quant", "compute_dtype"):
            # a default may be written out: the frozen recipe of a run does so
            if self.type == "int8" and getattr(self, key) != type(self).model_fields[key].default:
                yield Conflict(key, "is a setting of `nf4`; `int8` has none", "remove the line", ("type",))


class ModelSettings(Settings):
    name_or_path: Annotated[str, Field(min_length=1)]
    """A folder or hub id. With ``init: from_config`` only its ``config.json`` (and tokenizer) is read."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in training; ``auto`` keeps the type they were saved in."""
    init: Literal["pretrained", "sharded", "from_config"] = "pretrained"
    """``sharded`` gives each process only its share of the weights from the start (with DeepSpeed ZeRO-3); ``from_config`` starts from random weights, to pre-train a model of one's own."""
    config_overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``config.json`` to change, e.g. ``{num_hidden_layers: 6}``; with ``init: from_config`` only."""
    tokenizer: str | TokenizerTrainingSettings | None = None
    """Tokenizer to take over (folder or hub id), or a mapping that trains one on the corpus; None takes the model's own."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention kernel; ``auto`` uses llmkit's variable-length attention where the model allows it, else sdpa."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    quantization: Literal["nf4", "int8"] | QuantizationSettings | None = None
    """Keep the frozen weights under an adapter in 4 or 8 bits (QLoRA): ``nf4``, ``int8``, or a mapping. Needs an ``adapter``."""

    @property
    def quantized(self) -> QuantizationSettings | None:
        """``quantization`` in its long form."""
        given = self.quantization
        return QuantizationSettings(type=given) if isinstance(given, str) else given

    def conflicts(self) -> Iterator[Conflict]:
        if self.init == "from_config":
            if self.quantization is not None:
                message = "random weights are trained themselves, and quantized ones cannot be"
                yield Conflict("quantization", message, "remove it, or start from pretrained weights", ("init",))
            return
        hint = f"with `init: {self.init}` the weights decide; set `init: from_config` to begin from random weights"
        if self.config_overrides:
            yield Conflict("config_overrides", "needs `init: from_config`", hint, ("init",))
        if self.init == "sharded" and self.quantization is not None:
            yield Conflict("quantization", "weights are quantized whole", "use `init: pretrained`", ("init",))
        if isinstance(self.tokenizer, TokenizerTrainingSettings):
            yield Conflict("tokenizer", "training a tokenizer needs `init: from_config`", hint, ("init",))


class AdapterSettings(Settings):
    """A LoRA or DoRA adapter, in PEFT's names."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the update matrices."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by ``lora_alpha / r``."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter: ``all-linear``, a list of names, or a regular expression."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Layers trained in full beside the adapter and saved with it, e.g. ``[embed_tokens, lm_head]``."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(r)`` instead (rsLoRA, arXiv 2312.03732)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = True
    """Initialisation of the adapter."""

    def conflicts(self) -> Iterator[Conflict]:
        if not self.target_modules:
            yield Conflict("target_modules", "names no layer", "remove the line to take `all-linear`")
