"""Settings of ``fsdp:``, in accelerate's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from llmkit.recipe import Conflict, Settings


class FsdpSettings(Settings):
    """Fully sharded data parallel, version 2 (PyTorch's ``fully_shard``): an alternative to ``deepspeed``."""

    fsdp_version: Literal[2] = 2
    """2 is the only version: PyTorch has superseded the first."""
    reshard_after_forward: bool = True
    """Give gathered weights back after the forward pass and gather them again for the backward pass (ZeRO-3); false keeps them (ZeRO-2)."""
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = "TRANSFORMER_BASED_WRAP"
    """What is gathered together: a transformer layer, modules of at least ``min_num_params`` weights, or the whole model."""
    transformer_layer_cls_to_wrap: list[str] | None = None
    """Class names of the layers, for example ``[LlamaDecoderLayer]``; None takes those that the model says must not be split."""
    min_num_params: Annotated[int, Field(ge=1)] | None = None
    """Fewest weights of a module of its own, with ``SIZE_BASED_WRAP``; None is 100,000,000."""
    offload_params: bool = False
    """Keep weights, gradients and optimizer states in host memory, and take them to the device as they are used."""
    state_dict_type: Literal["SHARDED_STATE_DICT", "FULL_STATE_DICT"] = "SHARDED_STATE_DICT"
    """How checkpoints are written: each process its own share, or the first process everything. The exported model is always complete."""

    def conflicts(self) -> Iterator[Conflict]:
        by_class = self.auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
        if self.transformer_layer_cls_to_wrap is not None and not by_class:
            message = f"is read with `auto_wrap_policy: TRANSFORMER_BASED_WRAP` only, and it is {self.auto_wrap_policy}"
            yield Conflict("transformer_layer_cls_to_wrap", message, also=("auto_wrap_policy",))
        if self.transformer_layer_cls_to_wrap == []:
            yield Conflict("transformer_layer_cls_to_wrap", "names no class", "remove the line to find them")
        if self.min_num_params is not None and self.auto_wrap_policy != "SIZE_BASED_WRAP":
            message = f"is read with `auto_wrap_policy: SIZE_BASED_WRAP` only, and it is {self.auto_wrap_policy}"
            yield Conflict("min_num_params", message, also=("auto_wrap_policy",))
        if self.offload_params and self.state_dict_type == "FULL_STATE_DICT":
            message = "gathers weights on the devices, and `offload_params` keeps them away from there"
            yield Conflict(
                "state_dict_type", f"FULL_STATE_DICT {message}", "use SHARDED_STATE_DICT", ("offload_params",)
            )
