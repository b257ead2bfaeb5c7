"""FSDP2: PyTorch's ``fully_shard`` around a model (arXiv 2304.11277), in accelerate's terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llmkit.context import RunContext
from llmkit.errors import LlmkitError, UsageError
from llmkit.training.fsdp_settings import FsdpSettings
from llmkit.training.sharding import parameter_types, saved_buffers

LEAST_WEIGHTS = 100_000_000
FULL, SHARDED = "fsdp_state.pt", "fsdp_state"


class Fsdp:
    """A run under FSDP2; see :class:`llmkit.training.sharding.Shards`."""

    name, partitioned = "fsdp", True

    def __init__(self, settings: FsdpSettings, ctx: RunContext, *, bf16: bool) -> None:
        self._settings, self._ctx, self._bf16 = settings, ctx, bf16
        self._model: Any = None
        self._optimizer: Any = None
        self._types: dict[str, torch.dtype] = {}

    def wrap(
        self, model: Any, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> tuple[Any, torch.optim.Optimizer]:
        self._types = parameter_types(model)
        on_gpu = torch.cuda.is_available()  # without one the weights are in host memory anyway
        options: dict[str, Any] = {
            "reshard_after_forward": self._settings.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy() if self._settings.offload_params and on_gpu else OffloadPolicy(),
            "mesh": init_device_mesh("cuda" if on_gpu else "cpu", (self._ctx.world_size,)),
        }
        if self._bf16:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in wrapped_modules(model, self._settings):
            fully_shard(module, **options)
        fully_shard(model, **options)
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise LlmkitError("FSDP2 divided no weights")
        self._model, self._optimizer = model, make_optimizer()
        return model, self._optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Each part's gradients are reduced at once: keeping them whole until the last would take their memory."""
        loss.backward()

    def norm(self, most: float) -> float:
        shares = [_local(p.grad) for p in self._model.parameters() if p.grad is not None]
        square = torch.zeros((), device=_exchange())
        for share in shares:
            square += share.float().square().sum().to(square)
        dist.all_reduce(square)
        found = float(square.sqrt())
        if most and found > most:
            for share in shares:
                share.mul_(most / (found + 1e-6))
        return found

    def step(self) -> bool:
        self._optimizer.step()
        return True

    def save(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        full = self._settings.state_dict_type == "FULL_STATE_DICT"
        state = self._state(full=full)
        if not full:
            save(state, checkpoint_id=str(folder / SHARDED))
        elif self._ctx.is_main:
            torch.save(state, folder / FULL)

    def load(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        full = (folder / FULL).is_file()
        if full:
            state = torch.load(folder / FULL, map_location="cpu", weights_only=True) if self._ctx.is_main else {}
        else:
            state = self._state(full=False)
            load(state, checkpoint_id=str(folder / SHARDED))
        options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full, strict=False)
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state.get("model", {}),
            optim_state_dict=state.get("optimizer", {}), options=options,
        )  # fmt: skip

    def _state(self, *, full: bool) -> dict[str, Any]:
        """Frozen weights are left out: they are the base's, which is on disk."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        frozen = any(not p.requires_grad for p in self._model.parameters())
        options = StateDictOptions(full_state_dict=full, cpu_offload=full, ignore_frozen_params=frozen)
        model, optimizer = get_state_dict(self._model, self._optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            full: Any = parameter
            if isinstance(parameter, DTensor):
                shared: Any = parameter.detach().to(_exchange())
                full = shared.full_tensor()
            yield from self._mine(name, full, self._types[name])
        for name, buffer in saved_buffers(self._model):
            yield from self._mine(name, buffer, buffer.dtype)

    def close(self) -> None:
        """Nothing is left behind."""

    def _mine(self, name: str, tensor: Tensor, kind: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        if self._ctx.is_main:
            yield name, tensor.detach().to("cpu", kind, copy=True)


def _local(tensor: Any) -> Tensor:
    """The share of this process, which may be changed in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _exchange() -> str:
    """Where tensors have to be to go from process to process: NCCL knows no others than those on GPUs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def wrapped_modules(model: nn.Module, settings: FsdpSettings) -> list[nn.Module]:
    """What is divided and gathered by itself, inner modules first.

    Raises UsageError for a class that the model does not have.
    """
    if settings.auto_wrap_policy == "NO_WRAP":
        return []
    if settings.auto_wrap_policy == "SIZE_BASED_WRAP":
        return _by_size(model, settings.min_num_params or LEAST_WEIGHTS)
    bare: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    names = settings.transformer_layer_cls_to_wrap or list(bare._no_split_modules or [])
    there = {type(module).__name__ for module in model.modules()}
    if missing := [name for name in names if name not in there] if settings.transformer_layer_cls_to_wrap else []:
        repeated = sorted(name for name in there if name.endswith(("Layer", "Block")))
        raise UsageError(
            f"fsdp.transformer_layer_cls_to_wrap: this model has no {', '.join(missing)}. Its layers are"
            f" {', '.join(repeated)}."
        )
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise UsageError(
            "fsdp.transformer_layer_cls_to_wrap: the model does not say which of its layers belong together: name them,"
            " or set fsdp.auto_wrap_policy: SIZE_BASED_WRAP."
        )
    return found[::-1]


def _by_size(model: nn.Module, least: int) -> list[nn.Module]:
    """The smallest modules with at least ``least`` weights that are in none of their children's groups."""
    found: list[nn.Module] = []

    def free(module: nn.Module) -> int:
        rest = sum(p.numel() for p in module.parameters(recurse=False)) + sum(free(c) for c in module.children())
        if rest < least or module is model or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return rest
        found.append(module)
        return 0

    free(model)
    return found


def read_shares(folder: Path) -> dict[str, Any]:
    """The whole state of a checkpoint that every process wrote its share of; one process reads it."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = FileSystemReader(str(folder / SHARDED))
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state
