"""What a model is made of, without loading a weight: sizes from ``config.json``, tensors from safetensors headers.

Imports nothing heavy. Where a model has no weight file in reach (a hub model that was not fetched, ``init:
from_config``), the tensors of the usual decoders are written down from their configuration; any other architecture is
built on torch's meta device, which is imported only then.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.locate import check_folder, find_folder, weight_files
from llmkit.modeling.settings import ModelSettings, TokenizerTrainingSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by its type."""

_SAVED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
_ROWS_MULTIPLE = 64  # as modeling/load.py makes and grows embeddings
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|block|blocks)\.\d+\.")
_NOT_LINEAR = re.compile(r"(embed|wte|wpe|shared|relative_attention_bias|position|lm_head|embed_out|router)")
_SWIGLU = frozenset({"silu", "swish"})
_WRITTEN_DOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Architectures whose tensors this file knows; every other one without a weight file is built on the meta device."""
_RMS_WITH_EPSILON = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2", "granite", "mixtral", "qwen2_moe", "qwen3_moe",
})  # fmt: skip
"""Those whose norm training/kernels.py replaces."""


@dataclass(frozen=True)
class Tensor:
    """One weight: its name in the model, its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def in_layer(self) -> bool:
        return _LAYER.search(self.name) is not None

    @property
    def is_linear(self) -> bool:
        """A matrix that an adapter can be put on: two-dimensional, no embedding, not the output layer."""
        return len(self.shape) == 2 and self.name.endswith("weight") and not _NOT_LINEAR.search(self.name)


@dataclass(frozen=True)
class Architecture:
    """Sizes of a language model. ``source`` says where the tensors are known from, ``dtype`` what they are saved in.

    ``queries`` and ``keys`` are the widths of the query and of the key (or value) projection, ``inner`` that of the MLP;
    ``experts`` counts the MLPs that one token passes through.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tensors: tuple[Tensor, ...]
    source: str
    dtype: str = "float32"
    decoder_layers: int = 0
    """Layers of the decoder of a sequence-to-sequence model; 0 for a causal one."""
    gated: bool = True
    swiglu: bool = True
    lean_norm: bool = True
    qk_norm: bool = False
    experts: int = 1
    all_experts: int = 1
    dropout: float = 0.0
    longest: int = 0
    _config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def seq2seq(self) -> bool:
        return self.decoder_layers > 0

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """All weights; a tied one counts once."""
        return sum(tensor.count for tensor in self.tensors)

    @property
    def embedding(self) -> int:
        """Weights of the input embedding."""
        return self.vocabulary * self.hidden

    @property
    def tied(self) -> bool:
        """One matrix is input embedding and output layer."""
        return not any(t.name.endswith(("lm_head.weight", "embed_out.weight")) for t in self.tensors)

    @property
    def changes_logits(self) -> bool:
        """It scales or caps its logits after the output layer, so that the loss cannot apply that layer itself."""
        text = _text(self._config)
        return any(text.get(name) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))

    @property
    def linears(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.is_linear)

    @property
    def layer_parameters(self) -> int:
        """Weights of the largest layer."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            if found := _LAYER.search(tensor.name):
                sizes[tensor.name[: found.end()]] += tensor.count
        return max(sizes.values(), default=self.parameters)


def read_architecture(settings: ModelSettings) -> Architecture:
    """The architecture that a recipe's ``model:`` names. Raises MissingError or UsageError, as loading it would."""
    folder = find_folder(settings.name_or_path, settings.revision, weights=False)
    config = check_folder(folder, weights=False)
    if settings.init == "from_config":
        config = _new_config(settings, folder, config)
        return _without_weights(config, "float32", settings)
    try:
        files = weight_files(folder)
    except MissingError:
        return _without_weights(config, _named_type(config), settings)
    if any(file.suffix != ".safetensors" for file in files):
        return _without_weights(config, _named_type(config), settings)
    tensors, dtype = _from_headers(files)
    rows = _vocabulary(config, tensors)
    if _tied(config):
        tensors = [t for t in tensors if not t.name.endswith("lm_head.weight")]
    return _describe(config, _grown(tensors, rows, folder, settings), "safetensors headers", dtype)


def _from_headers(files: list[Path]) -> tuple[list[Tensor], str]:
    """Tensors of safetensors files, and the type that most of their weights have."""
    tensors: list[Tensor] = []
    kinds: Counter[str] = Counter()
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                tensors.append(Tensor(name, tuple(int(n) for n in entry["shape"])))
                kinds[str(entry["dtype"])] += tensors[-1].count
    most = kinds.most_common(1)
    return tensors, _SAVED.get(most[0][0] if most else "F32", "float32")


def _header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of length, then the header (see its format's documentation)."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise MissingError(f"{file} is damaged: it has {len(prefix)} bytes. Fetch or copy it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > file.stat().st_size:
            raise MissingError(
                f"{file} is damaged: it does not begin with a safetensors header. Fetch or copy it again"
            )
        try:
            found: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise MissingError(f"{file} is damaged: its header cannot be read. Fetch or copy it again") from error
    return found


def _new_config(settings: ModelSettings, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of ``init: from_config``: overrides applied, the vocabulary that of the tokenizer."""
    text = dict(_text(config)) | settings.config_overrides
    if {
        "hidden_size",
        "num_attention_heads",
    } & settings.config_overrides.keys() and "head_dim" not in settings.config_overrides:
        text.pop("head_dim", None)
    if isinstance(settings.tokenizer, TokenizerTrainingSettings):
        tokens = settings.tokenizer.vocab_size
    else:
        where = folder if settings.tokenizer is None else find_folder(settings.tokenizer, weights=False)
        tokens = tokenizer_size(where) or int(text.get("vocab_size") or 0)
    return text | {"vocab_size": _round_up(tokens)}


def tokenizer_size(folder: Path) -> int:
    """Tokens of the folder's ``tokenizer.json``, added ones included; 0 where there is none to read."""
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        known = found["model"]["vocab"]
        names = set(known) if isinstance(known, dict) else {piece for piece, _ in known}
        return len(names | {token["content"] for token in found.get("added_tokens", ())})
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _grown(tensors: list[Tensor], rows: int, folder: Path, settings: ModelSettings) -> list[Tensor]:
    """The embedding grows where the tokenizer has more tokens than it has rows (modeling/load.py)."""
    where = find_folder(settings.tokenizer, weights=False) if isinstance(settings.tokenizer, str) else folder
    tokens = tokenizer_size(where)
    if not rows or tokens <= rows:
        return tensors
    more = _round_up(tokens)
    return [
        Tensor(t.name, (more, *t.shape[1:])) if t.shape and t.shape[0] == rows and not t.in_layer else t
        for t in tensors
    ]


def _round_up(rows: int) -> int:
    return -(-rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _named_type(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in BYTES else "float32"


def _tied(config: dict[str, Any]) -> bool:
    return bool(_text(config).get("tie_word_embeddings", config.get("model_type") in ("gpt2", "t5", "gemma", "gemma2")))


def _vocabulary(config: dict[str, Any], tensors: list[Tensor]) -> int:
    for tensor in tensors:
        if re.search(r"(embed_tokens|wte|shared|embed_in|word_embeddings)\.weight$", tensor.name):
            return tensor.shape[0]
    return int(_text(config).get("vocab_size") or 0)


def _pick(config: dict[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _describe(config: dict[str, Any], tensors: list[Tensor], source: str, dtype: str) -> Architecture:
    text = _text(config)
    kind = str(text.get("model_type", ""))
    hidden = _pick(text, "hidden_size", "d_model", "n_embd")
    heads = _pick(text, "num_attention_heads", "num_heads", "n_head")
    layers = _pick(text, "num_hidden_layers", "num_layers", "n_layer", "encoder_layers")
    if not (hidden and heads and layers):
        raise UsageError(
            f"The configuration of this {kind or 'model'} names no hidden size, heads or layers: it cannot be planned"
        )
    activation = str(
        text.get("hidden_act") or text.get("activation_function") or text.get("feed_forward_proj") or "silu"
    )
    names = {t.name.rpartition(".")[0].rpartition(".")[2] for t in tensors}
    seq2seq = bool(text.get("is_encoder_decoder"))
    gated = bool(names & {"gate_proj", "gate_up_proj", "wi_0"})
    return Architecture(
        model_type=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_pick(text, "num_key_value_heads") or heads,
        head_dim=_pick(text, "head_dim", "d_kv") or hidden // heads,
        inner=_pick(text, "moe_intermediate_size", "intermediate_size", "d_ff", "n_inner", "ffn_dim") or 4 * hidden,
        vocabulary=_vocabulary(config, tensors),
        tensors=tuple(tensors),
        source=source,
        dtype=dtype,
        decoder_layers=(_pick(text, "num_decoder_layers", "decoder_layers") or layers) if seq2seq else 0,
        gated=gated,
        swiglu=gated and activation in _SWIGLU and "gate_up_proj" not in names,
        lean_norm=kind in _RMS_WITH_EPSILON,
        qk_norm="q_norm" in names,
        experts=_pick(text, "num_experts_per_tok") or 1,
        all_experts=_pick(text, "num_local_experts", "num_experts") or 1,
        dropout=max(
            float(text.get(name) or 0.0)
            for name in ("dropout_rate", "resid_pdrop", "attention_dropout", "hidden_dropout")
        ),
        longest=_pick(text, "max_position_embeddings", "n_positions"),
        _config=config,
    )


def _without_weights(config: dict[str, Any], dtype: str, settings: ModelSettings) -> Architecture:
    text = _text(config)
    if settings.init == "from_config" and settings.dtype != "auto":
        dtype = settings.dtype
    if str(text.get("model_type")) in _WRITTEN_DOWN:
        return _describe(text, list(_decoder(text)), "config.json", dtype)
    return _describe(config, _on_meta(settings, config), "the architecture on torch's meta device", dtype)


def _decoder(config: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors of a Llama-like decoder, by the names that Hugging Face gives them."""
    kind = str(config["model_type"])
    hidden, inner, vocabulary = (int(config[k]) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * dim, int(config.get("num_key_value_heads") or heads) * dim
    biased = bool(config.get("attention_bias", kind == "qwen2"))
    yield Tensor("model.embed_tokens.weight", (vocabulary, hidden))
    for i in range(int(config["num_hidden_layers"])):
        layer = f"model.layers.{i}"
        for name, shape in (
            ("q_proj", (queries, hidden)), ("k_proj", (keys, hidden)), ("v_proj", (keys, hidden)), ("o_proj", (hidden, queries)),
        ):  # fmt: skip
            yield Tensor(f"{layer}.self_attn.{name}.weight", shape)
            if biased and (kind != "qwen2" or name != "o_proj"):
                yield Tensor(f"{layer}.self_attn.{name}.bias", shape[:1])
        if kind == "qwen3":
            yield Tensor(f"{layer}.self_attn.q_norm.weight", (dim,))
            yield Tensor(f"{layer}.self_attn.k_norm.weight", (dim,))
        for name, shape in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            yield Tensor(f"{layer}.mlp.{name}.weight", shape)
            if config.get("mlp_bias"):
                yield Tensor(f"{layer}.mlp.{name}.bias", shape[:1])
        yield Tensor(f"{layer}.input_layernorm.weight", (hidden,))
        yield Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,))
    yield Tensor("model.norm.weight", (hidden,))
    if not config.get("tie_word_embeddings"):
        yield Tensor("lm_head.weight", (vocabulary, hidden))


def _on_meta(settings: ModelSettings, config: dict[str, Any]) -> list[Tensor]:
    """Shapes from the model's own code, on a device without memory. Slow (it imports torch): the last resort."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        from llmkit.modeling.load import load_config
    except ImportError as error:
        raise MissingError.extra(error.name or "transformers", "train") from None
    made = load_config(settings)
    if settings.init == "from_config":
        made.get_text_config().vocab_size = int(_text(config)["vocab_size"])
    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: Any = auto.from_config(made, trust_remote_code=settings.trust_remote_code)  # type: ignore[no-untyped-call]
    except (ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"{settings.name_or_path}: no model can be made from its configuration: {error}") from error
    return [Tensor(name, tuple(p.shape)) for name, p in model.named_parameters()]


def needs_torch(settings: ModelSettings) -> bool:
    """Whether :func:`read_architecture` would import torch; for a line that says so."""
    try:
        folder = find_folder(settings.name_or_path, settings.revision, weights=False)
        config = check_folder(folder, weights=False)
    except (MissingError, UsageError):
        return False
    if str(_text(config).get("model_type")) in _WRITTEN_DOWN:
        return False
    if settings.init == "from_config":
        return True
    try:
        return any(file.suffix != ".safetensors" for file in weight_files(folder))
    except MissingError:
        return True
