"""Load the transformer under an embedding: the base model without its output layer, an adapter merged into it.

``layer`` cuts what stands above it off, so that it is neither kept nor computed.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel

from llmkit.errors import MissingError, UsageError
from llmkit.inference.embedding.folder import EmbeddingFolder
from llmkit.modeling.adapters import load_adapter, merge_weights
from llmkit.modeling.load import check_finite, embedding_rows, quiet
from llmkit.modeling.locate import BaseInfo, check_folder, find_base

_HEADS = ("pooler.", "cls.", "lm_head.", "score.", "classifier.", "qa_outputs.")
"""Weights that an embedding does without, whether a folder lacks them or has them."""
_NORMS = ("norm", "final_layer_norm", "ln_f", "final_norm", "layer_norm")
_CLOSE = 1e-4


def open_backbone(folder: EmbeddingFolder, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that gives the states of tokens, in ``dtype`` on the CPU, in evaluation mode.

    Raises MissingError for a folder that is not complete or holds NaN, UsageError for a model that cannot be loaded.
    """
    name = str(dtype).removeprefix("torch.")
    if folder.is_adapter:
        model = _with_adapter(folder.weights, name, trust_remote_code)
    else:
        model = load_weights(folder.weights, name, trust_remote_code)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]  # pooling is ours
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def cut_above(model: PreTrainedModel, layer: int | None) -> PreTrainedModel:
    """``model`` whose last states are those above layer ``layer`` (1 is the first, -1 the last, -2 the one before it).

    The states are compared with the whole model's. Raises UsageError for a layer that the model does not have, or
    where it cannot be cut.
    """
    stack_name, stack = _stack(model)
    count = len(stack)
    if layer is None or layer in (-1, count):
        return model
    wanted = layer if layer > 0 else count + 1 + layer
    if not 0 < wanted <= count:
        raise UsageError(f"embedding.layer: {layer} is not there: the model has {count} layers, 1 to {count}")
    ids = torch.arange(3, 9, device=model.device)[None] % embedding_rows(model)
    with torch.inference_mode():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[wanted]
    parent = model.get_submodule(stack_name.rpartition(".")[0]) if "." in stack_name else model
    setattr(parent, stack_name.rpartition(".")[2], stack[:wanted])
    model.config.get_text_config().num_hidden_layers = wanted
    for name in (None, *(name for name in _NORMS if hasattr(parent, name))):
        kept = getattr(parent, name) if name is not None else None
        if name is not None:
            setattr(parent, name, nn.Identity())
        with torch.inference_mode():
            found = model(input_ids=ids).last_hidden_state
        if torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=_CLOSE * float(expected.abs().max())):
            return model
        if name is not None:
            setattr(parent, name, kept)
    raise UsageError(f"embedding.layer: a {model.config.model_type} model cannot be cut at a layer; leave it out")


def load_weights(path: Path, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """The base model of a folder; only an output layer or a pooler may be missing. MissingError or UsageError."""
    check_folder(path)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
            encodes = config.is_encoder_decoder and type(config) in AutoModelForTextEncoding._model_mapping
            model, info = (AutoModelForTextEncoding if encodes else AutoModel).from_pretrained(str(path), **kwargs)
        except RuntimeError as error:
            raise MissingError(f"The weights in {path} do not fit its config.json: {_first(error)}") from error
        except (ValueError, OSError, KeyError, ImportError) as error:
            raise UsageError(f"{path} cannot be loaded for embeddings: {_first(error)}") from error
    missing = [key for key in info["missing_keys"] if not any(head in f"{key}." for head in _HEADS)]
    wrong = [*missing, *(str(key) for key, *_ in info["mismatched_keys"]), *info["error_msgs"]]
    if wrong:
        raise MissingError(
            f"The weights in {path} are not those of its config.json: {len(wrong)} are missing or have another shape, "
            f"first {sorted(wrong)[0]}. They would be random numbers, so this is refused"
        )
    check_finite(model, str(path))
    return model  # type: ignore[no-any-return]


def _with_adapter(path: Path, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """An adapter merged into its base. One that was trained on a language model sits below its output layer."""
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise MissingError(f"{path / 'adapter_config.json'} is not JSON: {error}") from error
    if BaseInfo.read(path) is not None or config.get("task_type") in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        whole = merge_weights(load_adapter(path, dtype=dtype)[0])
        inner: Any = whole.base_model
        return inner  # type: ignore[no-any-return]
    from peft import PeftModel

    name = str(config.get("base_model_name_or_path") or "")
    base = load_weights(find_base(name, name, config.get("revision"))[1], dtype, trust_remote_code)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # weights that PEFT could not place are a warning there
        try:
            peft_model = PeftModel.from_pretrained(base, str(path))
        except (RuntimeError, ValueError, KeyError, UserWarning) as error:
            raise MissingError(f"The adapter in {path} does not fit its base {name}: {_first(error)}") from error
    check_finite(peft_model, str(path))
    return merge_weights(peft_model)


def _stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's layers: the longest list of modules in it."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    count = int(model.config.get_text_config().num_hidden_layers)
    found = [entry for entry in lists if len(entry[1]) == count]
    if not found:
        raise UsageError(f"embedding.layer: the layers of a {model.config.model_type} model were not found")
    return found[0]


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
