"""``llmkit export-weights``: a checkpoint whose weights are divided among files becomes a model, or an adapter, again."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.adapters import ADAPTER_CONFIG
from llmkit.modeling.export import save_adapter, save_model, take_probe, verify
from llmkit.modeling.load import auto_class, open_model
from llmkit.modeling.locate import BaseInfo, find_base
from llmkit.modeling.probe import dtype_name
from llmkit.modeling.tokenizer import open_tokenizer
from llmkit.training import checkpoints
from llmkit.training.checkpoints import Manifest
from llmkit.training.dividing import EXPORT
from llmkit.training.sharding import Tensors, fill, skeleton, with_adapter

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ExportReport:
    """What was made of which checkpoint; ``relative`` is how far the reopened model's logits were off (see probe.py)."""

    output: str
    checkpoint: str
    step: int
    engine: str
    kind: str
    dtype: str
    weights: int
    relative: float


def export_weights(
    checkpoint: str | Path, output: str | Path | None = None, *, dtype: DType | None = None
) -> ExportReport:
    """Put the weights of a ZeRO or FSDP checkpoint together, save them in Hugging Face's layout and open them again.

    ``output`` None is ``model-STEP`` or ``adapter-STEP`` in the run's folder; ``dtype`` None the type that the weights
    had in the recipe (an adapter: float32). Needs memory for the whole model in float32. Raises UsageError for what is
    no such checkpoint, MissingError for one that is damaged, GateError where the result does not open as what it was.
    """
    folder = Path(checkpoint).expanduser().absolute()
    manifest = _manifest(folder)
    about = folder / EXPORT
    adapter = (about / ADAPTER_CONFIG).is_file()
    target = _target(folder, manifest.step, output, adapter)
    found = _weights(folder, manifest)
    model = _adapter_model(about, found, dtype) if adapter else _full_model(about, found, dtype)
    tokenizer = open_tokenizer(about)
    stops = _stops(about)
    unchecked = target.with_name(f"{target.name}.unchecked")
    probe = take_probe(model, tokenizer)
    if adapter:
        base = BaseInfo.read(about)
        assert base is not None
        save_adapter(model, tokenizer, unchecked, base, stop_ids=stops)
    else:
        save_model(model, tokenizer, unchecked, stop_ids=stops)
    checked = verify(unchecked, probe)
    unchecked.rename(target)
    return ExportReport(
        output=str(target),
        checkpoint=str(folder),
        step=manifest.step,
        engine=manifest.engine,
        kind="adapter" if adapter else "model",
        dtype=dtype or ("float32" if adapter else dtype_name(model)),
        weights=sum(tensor.numel() for tensor in found.values()),
        relative=checked.relative,
    )


def _manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise UsageError(f"There is no checkpoint folder {folder}.")
    if (folder / "checkpoints").is_dir():
        newest = next(iter(checkpoints.newest_first(folder / "checkpoints")), None)
        hint = f" Its newest checkpoint is {newest}." if newest else ""
        raise UsageError(f"{folder} is a run, not a checkpoint.{hint}")
    if why := checkpoints.problem(folder):
        raise UsageError(f"{folder} is not a complete checkpoint of llmkit ({why}).")
    manifest = Manifest.read(folder)
    if not manifest.engine:
        raise UsageError(f"{folder} was written without sharding: the model in it is whole already.")
    if not (folder / EXPORT).is_dir():
        raise MissingError(f"{folder} has no {EXPORT}/, which says what model the weights are of.")
    return manifest


def _target(folder: Path, step: int, output: str | Path | None, adapter: bool) -> Path:
    name = f"{'adapter' if adapter else 'model'}-{step}"
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    target = Path(output).expanduser().absolute() if output is not None else run / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already; it is not overwritten. Give another --output, or remove it.")
    if target.exists():
        target.rmdir()
    shutil.rmtree(target.with_name(f"{target.name}.unchecked"), ignore_errors=True)
    return target


def _weights(folder: Path, manifest: Manifest) -> Tensors:
    return _of_fsdp(folder) if manifest.engine == "fsdp" else _of_zero(folder)


def _of_zero(folder: Path) -> Tensors:
    """Float32 weights by name, by DeepSpeed's own reader; frozen ones are in the base and not in the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        # It tells about its progress on both.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=False)
    except (ValueError, FileNotFoundError, KeyError, RuntimeError) as error:
        raise MissingError(f"{folder} cannot be read: {error}") from error
    return dict(found)


def _of_fsdp(folder: Path) -> Tensors:
    from llmkit.training.fsdp import FULL, read_shares

    if (folder / FULL).is_file():
        state: dict[str, Any] = torch.load(folder / FULL, map_location="cpu", weights_only=True)
    else:
        state = read_shares(folder)
    return dict(state["model"])


def _full_model(about: Path, found: Tensors, dtype: DType | None) -> Any:
    config = AutoConfig.from_pretrained(str(about))
    kind = getattr(torch, dtype) if dtype else _recorded_type(config)
    model = fill(skeleton(config, auto_class(config), kind), _cast(found, kind))
    if (about / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(about))
    return model


def _recorded_type(config: Any) -> torch.dtype:
    kind = config.dtype
    return kind if isinstance(kind, torch.dtype) else getattr(torch, str(kind or "float32"))


def _adapter_model(about: Path, found: Tensors, dtype: DType | None) -> Any:
    base = BaseInfo.read(about)
    if base is None:
        raise MissingError(f"{about} does not say which model the adapter belongs to.")
    config = PeftConfig.from_pretrained(str(about))
    start = getattr(config, "init_lora_weights", True)
    if start in ("pissa", "olora"):
        raise UsageError(
            f"{about.parent} holds a {start} adapter, whose start was taken out of the base: only its own run can write it. Go on with the run, with train.max_steps at this step."
        )
    _, folder = find_base(base.name_or_path, base.path, base.revision)
    model = with_adapter(open_model(folder, dtype=base.dtype), SimpleNamespace(peft_config={"default": config}))
    own = {name: tensor for name, tensor in found.items() if "lora_" in name or "modules_to_save" in name}
    return fill(model, _cast(own, getattr(torch, dtype or "float32")), partly=True)


def _cast(found: Tensors, kind: torch.dtype) -> Tensors:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(kind).contiguous() if tensor.is_floating_point() else tensor

    return {name: cast(tensor) for name, tensor in found.items()}


def _stops(about: Path) -> tuple[int, ...]:
    file = about / "generation_config.json"
    if not file.is_file():
        return ()
    eos = GenerationConfig.from_pretrained(str(about)).eos_token_id
    return tuple(int(i) for i in (eos if isinstance(eos, list) else [] if eos is None else [eos]))
