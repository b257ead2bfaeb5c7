"""Training with weights, gradients or optimizer states divided among processes: what DeepSpeed and FSDP have in common.

The trainer talks to a :class:`Shards` object and does not know which of the two it is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

Tensors = dict[str, Tensor]


class Shards(Protocol):
    """One run's engine. All methods are called by every process together, in the same order.

    ``name`` says what it is (``zero2``, ``fsdp``), ``partitioned`` whether a process holds a share of the weights only.
    """

    name: str
    partitioned: bool

    def wrap(
        self, model: Any, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> tuple[Any, torch.optim.Optimizer]:
        """Divide ``model`` (in place); what is called in training, and the optimizer whose learning rates count."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``; ``last`` says that the step's gradients are complete with it."""

    def norm(self, most: float) -> float:
        """Norm of the step's gradients over all processes, clipped to ``most`` (0: not)."""

    def step(self) -> bool:
        """Update the weights; False where a loss scaler skipped the step."""

    def save(self, folder: Path) -> None:
        """Weights and optimizer states, each process its share."""

    def load(self, folder: Path) -> None: ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights by name, one after the other and on the CPU; on the first process only, nothing on others."""

    def close(self) -> None:
        """The last call: there will be no more training."""


def group_of_one() -> None:
    """A process group for one process alone, where there is none yet: engines talk to one whatever its size.

    It stays open to the end of the process: groups that DeepSpeed derived from it would outlive it.
    """
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store: Any = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


@contextmanager
def rank_variables() -> Iterator[None]:
    """For one process alone, the variables that DeepSpeed reads."""
    mine = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    mine = {key: value for key, value in mine.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            os.environ.pop(key, None)


def skeleton(config: Any, like: type[Any], dtype: torch.dtype) -> PreTrainedModel:
    """A model of class ``like`` (or of an AutoModel class) with the shapes of its weights and without their values; buffers are real."""
    from accelerate import init_empty_weights

    make = getattr(like, "from_config", None) or like._from_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = make(copy.deepcopy(config), dtype=dtype)
    return model


def whole_model(model: Any, found: Mapping[str, Tensor]) -> Any:
    """``model`` (a PreTrainedModel or PeftModel) made anew on the CPU with the weights ``found`` under its names.

    The new one is ordinary: no hooks, nothing divided. Raises RuntimeError where a weight is missing.
    """
    peft = hasattr(model, "peft_config")
    bare = model.get_base_model() if peft else model
    made: Any = skeleton(bare.config, type(bare), next(iter(found.values())).dtype)
    made.generation_config = bare.generation_config
    if peft:
        made = with_adapter(made, model)
    return fill(made, found)


def fill(model: Any, found: Mapping[str, Tensor], *, partly: bool = False) -> Any:
    """``model`` with the weights ``found``; ``partly`` leaves the others as they are.

    Raises RuntimeError where a weight has no place, or a place no weight.
    """
    result = model.load_state_dict(dict(found), strict=False, assign=True)
    (model.get_base_model() if hasattr(model, "peft_config") else model).tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    lost = [*result.unexpected_keys, *missing]
    if lost or (partly and not found):
        raise RuntimeError(f"weights were lost on the way: {lost[:5]}")
    return model.eval()


def with_adapter(base: Any, like: Any) -> Any:
    """``base`` with an adapter like that of ``like``, whose values are not set yet."""
    from peft import get_peft_model

    from llmkit.modeling.adapters import use_input_type

    (name,) = like.peft_config
    config = copy.deepcopy(like.peft_config[name])
    start, config.init_lora_weights = config.init_lora_weights, False  # the values come later
    made = get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=False)
    made.peft_config[name].init_lora_weights = start
    use_input_type(made)
    if (initial := vars(like).get("_llmkit_initial_adapter")) is not None:
        made.__dict__["_llmkit_initial_adapter"] = initial
    return made


def parameter_types(model: nn.Module) -> dict[str, torch.dtype]:
    """What each weight was kept in before an engine changed it: the export's types."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the saved model; others are made anew with it."""
    saved = set(model.state_dict())
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def small_twin(model: Any, device: torch.device) -> Any:
    """A model of the same class and widths with few layers and random weights, on ``device``.

    Stands in where ``model`` cannot be asked, because no process has it whole. It has as many layers as it takes to see
    each kind once, and the adapter of ``model``.
    """
    peft = hasattr(model, "peft_config")
    bare = model.get_base_model() if peft else model
    config = copy.deepcopy(bare.config)
    _few_layers(config.get_text_config())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin: Any = type(bare)._from_config(config, dtype=next(bare.parameters()).dtype)
        if peft:
            twin = with_adapter(twin, model)
    return twin.to(device)


def _few_layers(config: Any) -> None:
    kinds = list(getattr(config, "layer_types", None) or [])
    most = max(2, *(kinds.index(kind) + 1 for kind in set(kinds))) if kinds else 2
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, min(most, getattr(config, key)))
    if kinds:
        config.layer_types = kinds[:most]
