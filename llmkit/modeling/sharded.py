"""Load a model whose weights are divided among processes from the start: no process ever holds it whole (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.load import auto_class, for_training, load_config, quiet
from llmkit.modeling.locate import check_folder, find_folder, saved_dtype, weight_files
from llmkit.modeling.settings import ModelSettings

Gather = Callable[[list[Any]], AbstractContextManager[Any]]
"""Within it the given weights are whole on every process; what the first one wrote is divided again at its end."""


def load_sharded(
    settings: ModelSettings, *, tokenizer: PreTrainedTokenizerBase, divided: AbstractContextManager[Any], gather: Gather
) -> PreTrainedModel:
    """The model of a recipe with ``init: sharded``: made within ``divided``, filled weight by weight.

    The first process reads one weight at a time from the files; all processes hold that one, then their share of it.
    Raises MissingError for weights that are missing, left over or not finite, UsageError for a model or a tokenizer that
    cannot be loaded so.
    """
    config = load_config(settings)
    folder = find_folder(settings.name_or_path, settings.revision)
    check_folder(folder)
    _check_possible(settings, config, folder, len(tokenizer))
    name = settings.dtype if settings.dtype != "auto" else saved_dtype(folder)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, name), "trust_remote_code": settings.trust_remote_code}
    if settings.attn_implementation != "auto":
        kwargs["attn_implementation"] = settings.attn_implementation
    with quiet(), no_init_weights(), divided:
        model: PreTrainedModel = auto_class(config).from_config(config, **kwargs)
    model.tie_weights()
    _fill(model, folder, gather)
    _check_finite(model.named_parameters(), folder)
    return for_training(model.eval(), tokenizer)


def _check_possible(settings: ModelSettings, config: Any, folder: Path, tokens: int) -> None:
    rows = int(config.get_text_config().vocab_size)
    if getattr(config, "quantization_config", None):
        raise UsageError(f"{settings.name_or_path} has quantized weights, which cannot be trained.")
    if tokens > rows:
        raise UsageError(
            f"model.init: sharded: the tokenizer has {tokens} tokens and the model {rows} rows for them. An embedding"
            " grows with model.init: pretrained only."
        )
    if any(file.suffix != ".safetensors" for file in weight_files(folder)):
        raise UsageError(f"model.init: sharded reads safetensors files, and {folder} has others.")


def _fill(model: PreTrainedModel, folder: Path, gather: Gather) -> None:
    places: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    places |= {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    filled: set[int] = set()
    unknown: list[str] = []
    for name, read in _stored(folder):
        place = places.get(name, places.get(f"{model.base_model_prefix}.{name}"))
        if place is None:
            unknown.append(name)
            continue
        with torch.no_grad(), gather([place]):
            if dist.get_rank() == 0 or not hasattr(place, "ds_id"):
                place.data.copy_(read())
        filled.add(id(place))
    missing = sorted(name for name, place in places.items() if id(place) not in filled)
    if unknown or missing:
        what = [f"not in the files: {', '.join(missing[:4])}"] if missing else []
        what += [f"without a place in the model: {', '.join(unknown[:4])}"] if unknown else []
        raise MissingError(
            f"model.init: sharded: weights of {folder} and of its config.json differ ({'; '.join(what)}). Some models"
            " are stored under other names than they have: load those with model.init: pretrained."
        )


def _stored(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names of the stored weights, in the same order on every process, each with a function that reads it."""
    from safetensors import safe_open

    for path in sorted(weight_files(folder)):
        with safe_open(str(path), framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, lambda file=file, name=name: file.get_tensor(name)  # type: ignore[misc]


def _check_finite(named: Iterable[tuple[str, Any]], folder: Path) -> None:
    """Each process looks at its share, and all hear of what one found."""
    bad = []
    for name, parameter in named:
        share = getattr(parameter, "ds_tensor", parameter)
        if share.is_floating_point() and share.numel() and not bool(torch.isfinite(share).all()):
            bad.append(name)
    found = torch.tensor(len(bad))
    found = found.cuda() if torch.cuda.is_available() else found
    dist.all_reduce(found)
    if int(found):
        raise MissingError(f"{folder} holds weights that are not finite (NaN or infinity): {', '.join(bad[:4])}")
