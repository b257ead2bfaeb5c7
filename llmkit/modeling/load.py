"""Load a model for training: from a folder, a hub id, or with random weights from a configuration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from llmkit.errors import MissingError, UsageError
from llmkit.modeling import quantized
from llmkit.modeling.locate import check_folder, find_folder, model_digest
from llmkit.modeling.settings import ModelSettings, QuantizationSettings
from llmkit.modeling.tokenizer import load_tokenizer, stop_ids

__all__ = [
    "ParameterCount", "count_parameters", "embedding_rows", "is_seq2seq", "load_config", "load_model", "load_tokenizer", "model_digest",
    "open_model", "plain_attention", "quiet", "stop_ids",
]  # fmt: skip

ROWS_MULTIPLE = 64
"""An embedding that has to be made or to grow gets a multiple of so many rows: GPUs multiply such matrices faster."""

_BUILT_IN_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}

_DECIDED = {
    "vocab_size": "it follows the tokenizer (model.tokenizer)",
    "dtype": "set model.dtype",
    "torch_dtype": "set model.dtype",
    "model_type": "name a model of the other kind in model.name_or_path",
    "is_encoder_decoder": "name a model of the other kind in model.name_or_path",
    "eos_token_id": "it follows the tokenizer (model.tokenizer)",
    "bos_token_id": "it follows the tokenizer (model.tokenizer)",
    "pad_token_id": "it follows the tokenizer (model.tokenizer)",
}
"""Keys of a configuration that another part of the recipe decides."""

_NOT_ARCHITECTURE = {
    "transformers_version", "architectures", "attribute_map", "base_config_key", "sub_configs", "id2label", "label2id",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions", "keys_to_ignore_at_inference",
}  # fmt: skip


class ParameterCount(NamedTuple):
    """Numbers of weights; a tied weight counts once. ``embedding`` is the input embedding's share of ``all``."""

    all: int
    trainable: int
    embedding: int


def is_seq2seq(settings: ModelSettings) -> bool:
    """Does the model have an encoder and a decoder (T5)? Read from its configuration."""
    return bool(load_config(settings).is_encoder_decoder)


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's configuration; with ``init: from_config`` the recipe's ``config_overrides`` applied to it.

    Raises MissingError for a missing or broken folder or where quantization wants a package that is not there, and
    UsageError listing every override that is wrong.
    """
    if settings.quantization is not None:
        quantized.check_installed()
    folder = find_folder(settings.name_or_path, settings.revision, weights=False)
    check_folder(folder, weights=False)
    if settings.init != "from_config" and settings.config_overrides:
        raise UsageError(
            "model.config_overrides changes the architecture, which pretrained weights would not fit: "
            "it is for model.init: from_config"
        )
    config = _open_config(folder, settings.trust_remote_code)
    if settings.config_overrides:
        config = _override(config, settings.config_overrides)
    return config


def load_model(settings: ModelSettings, *, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The model of a recipe on the CPU, in training type, ready to be trained with ``tokenizer``.

    A quantized model is where it will be trained: on the GPU where there is one. A vocabulary larger than the embedding
    makes the embedding grow (tied ones stay tied). Every weight is known to come from the folder and to be finite.
    ``seed`` decides random weights; the caller's random state is left as it was.
    Raises MissingError for a folder that is not complete or does not fit its configuration, UsageError for
    settings that this model cannot be loaded with.
    """
    config = load_config(settings)
    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"{settings.name_or_path} has quantized weights, which cannot be trained: name the unquantized model "
            "(for QLoRA with `model.quantization: nf4`, which quantizes it while it is read)"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if settings.init == "from_config":
            model = _from_config(settings, config, tokenizer)
        else:
            folder = find_folder(settings.name_or_path, settings.revision)
            model = open_model(
                folder,
                dtype=settings.dtype,
                attn=settings.attn_implementation,
                trust_remote_code=settings.trust_remote_code,
                quantization=settings.quantized,
            )
            _grow_embedding(model, len(tokenizer))
    return for_training(model, tokenizer)


def for_training(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """``model`` with the padding of ``tokenizer``, and no row of its embedding left out of the training."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    _free_padding_row(model)
    return model


def open_model(
    folder: str | Path,
    *,
    dtype: str = "auto",
    attn: str = "auto",
    trust_remote_code: bool = False,
    quantization: QuantizationSettings | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """A complete model from a local folder, in evaluation mode, checked: no weight missing, left over or not finite.

    ``dtype`` is ``auto`` or the name of a torch type. ``quantization`` quantizes the linear layers while they are read,
    on ``device``: None is the GPU where there is one (another model comes on the CPU). Raises MissingError or UsageError.
    """
    path = Path(folder)
    check_folder(path)
    config = _open_config(path, trust_remote_code)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    if attn != "auto":
        kwargs["attn_implementation"] = attn
    if quantization is not None:
        quantized.check_installed()
        quantized.check_saved_finite(path)
        where = device or (torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        kwargs |= quantized.loading_arguments(quantization, where)
    with quiet():
        try:
            model, info = auto_class(config).from_pretrained(str(path), **kwargs)
        except ImportError as error:
            raise MissingError(f"{path} cannot be loaded with attn_implementation {attn}: {_first(error)}") from error
        except RuntimeError as error:
            raise MissingError(f"The weights in {path} do not fit its config.json: {_shapes(error)}") from error
        except (ValueError, OSError, KeyError) as error:
            raise UsageError(f"{path} cannot be loaded: {_first(error)}") from error
    _check_loading_info(path, info)
    check_finite(model, str(path))
    if quantization is not None and not quantized.use_own_product(model):
        raise UsageError(f"{path} has no linear layer that could be quantized: remove model.quantization")
    return model  # type: ignore[no-any-return]


def count_parameters(model: nn.Module) -> ParameterCount:
    """All weights, those that are trained, and those of the input embedding."""
    parameters = list(model.parameters())
    embedding = _input_embedding(model)
    return ParameterCount(
        all=sum(quantized.weights_of(p) for p in parameters),
        trainable=sum(quantized.weights_of(p) for p in parameters if p.requires_grad),
        embedding=sum(quantized.weights_of(p) for p in embedding.parameters()) if embedding is not None else 0,
    )


def _input_embedding(model: Any) -> Any:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def embedding_rows(model: Any) -> int:
    """Rows of the input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_finite(model: nn.Module, what: str) -> None:
    """Raises MissingError naming the weights of ``what`` that hold NaN or infinity."""
    bad = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if bad:
        raise MissingError(
            f"{what} holds weights that are not finite (NaN or infinity): {_some(bad)}. "
            "Such a model is damaged; take another copy or an earlier checkpoint"
        )


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within it the model attends by torch's own kernel, whatever attention training has put in its place."""
    config: Any = model.config
    before = config._attn_implementation
    if before not in _BUILT_IN_ATTENTION:
        config._attn_implementation = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _open_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UsageError(f"{folder / 'config.json'} cannot be used: {_first(error)}") from error
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that makes models of ``config``. Probed, not guessed from names; UsageError where there is none."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    remote = getattr(config, "auto_map", None) or {}
    if type(config) not in auto._model_mapping and auto.__name__ not in remote:
        raise UsageError(
            f"A {config.model_type} model is not a language model that writes text, so llmkit cannot train or run it"
        )
    return auto


def _override(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Rebuild the configuration with other values, so that its own checks run on the whole."""
    allowed = _config_keys(config)
    wrong = []
    for key in overrides:
        if key in _DECIDED:
            wrong.append(f"model.config_overrides.{key}: {_DECIDED[key]}")
        elif key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" It has {', '.join(sorted(allowed))}"
            wrong.append(f"model.config_overrides.{key}: a {config.model_type} configuration has no such key.{hint}")
    if wrong:
        raise UsageError("\n".join(wrong))
    merged = config.to_dict() | overrides
    if "num_hidden_layers" in overrides:
        # Per-layer lists and derived sizes belong to the old number of layers.
        merged.pop("layer_types", None)
    if {"hidden_size", "num_attention_heads"} & set(overrides) and "head_dim" not in overrides:
        merged.pop("head_dim", None)
    if "num_attention_heads" in overrides and "num_key_value_heads" not in overrides:
        heads = int(merged["num_attention_heads"])
        if heads % int(merged.get("num_key_value_heads") or heads):
            merged["num_key_value_heads"] = heads
    try:
        return type(config).from_dict(merged)
    except Exception as error:
        raise UsageError(f"model.config_overrides: {' '.join(str(error).split())}") from error


def _config_keys(config: PreTrainedConfig) -> set[str]:
    """What may be overridden: the keys of this configuration's written form and its constructor's own arguments."""
    accepted = set(inspect.signature(type(config).__init__).parameters) - {"self", "kwargs", "args"}
    if fields := getattr(config, "__dataclass_fields__", None):
        accepted &= set(fields)
    known = (accepted | set(config.to_dict()) | set(config.attribute_map)) - set(_DECIDED)
    return {key for key in known if key[0] != "_" and not key.endswith("_plan") and key not in _NOT_ARCHITECTURE}


def _from_config(
    settings: ModelSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Random weights. ``auto`` means float32 here: nothing was saved, and training from scratch wants the precision."""
    text = config.get_text_config()
    text.vocab_size = _round_up(len(tokenizer))
    text.bos_token_id = tokenizer.bos_token_id
    text.eos_token_id = tokenizer.eos_token_id
    # With a padding token known, embeddings start that row at zero and keep it there: wrong where padding is eos.
    text.pad_token_id = tokenizer.pad_token_id if config.is_encoder_decoder else None
    if config.is_encoder_decoder and config.decoder_start_token_id is None:
        config.decoder_start_token_id = tokenizer.pad_token_id
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    if settings.attn_implementation != "auto":
        kwargs["attn_implementation"] = settings.attn_implementation
    with quiet():
        try:
            model: PreTrainedModel = auto_class(config).from_config(config, **kwargs)
        except ImportError as error:
            raise MissingError(f"model.attn_implementation {settings.attn_implementation}: {_first(error)}") from error
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UsageError(f"No model can be made from this configuration: {_first(error)}") from error
    check_finite(model, f"the new model ({settings.name_or_path})")
    return model


def _grow_embedding(model: PreTrainedModel, tokens: int) -> None:
    """Rows for tokens that the embedding does not have; they start at the mean of the old rows."""
    if tokens > embedding_rows(model):
        with quiet():
            model.resize_token_embeddings(_round_up(tokens), mean_resizing=True)


def _free_padding_row(model: PreTrainedModel) -> None:
    """torch gives ``padding_idx`` no gradient; where padding is eos that would freeze the row of a real token."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def _check_loading_info(folder: Path, info: dict[str, Any]) -> None:
    problems = []
    if info["missing_keys"]:
        problems.append(
            f"{len(info['missing_keys'])} weights that the model has are not in the files: {_some(info['missing_keys'])}"
        )
    if info["unexpected_keys"]:
        problems.append(
            f"{len(info['unexpected_keys'])} weights in the files have no place in the model: {_some(info['unexpected_keys'])}"
        )
    if info["mismatched_keys"]:
        names = [
            f"{key} ({list(here)} in the file, {list(there)} in the model)"
            for key, here, there in info["mismatched_keys"]
        ]
        problems.append(f"shapes differ: {_some(names)}")
    problems += info["error_msgs"]
    if problems:
        raise MissingError(
            f"The weights in {folder} are not those of its config.json ({'; '.join(problems)}). "
            "Layers that are missing would be filled with random numbers, so this is refused"
        )


def _finite(parameter: torch.Tensor) -> bool:
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return True
    low, high = torch.aminmax(parameter.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load report: the checks here say the same more clearly."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _round_up(rows: int) -> int:
    return -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _shapes(error: RuntimeError) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:4])
