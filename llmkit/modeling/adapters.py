"""LoRA and DoRA adapters: put one on a model, load one, merge one into its base.

Types. An adapter's weights are float32 whatever the base is: AdamW moves them by about the learning rate, which is
less than bfloat16 can tell from zero beside weights of that size. They are used in the type of the layer's input, as
mixed precision does. PEFT's own way, to cast the input up and multiply in float32, keeps a float32 copy of every input
for the backward pass.
"""

from __future__ import annotations

import difflib
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import MissingError, UsageError
from llmkit.modeling.load import check_finite, embedding_rows, open_model
from llmkit.modeling.locate import BaseInfo, check_safetensors, find_base, model_digest
from llmkit.modeling.quantized import is_quantized
from llmkit.modeling.settings import AdapterSettings

if TYPE_CHECKING:
    from llmkit.modeling.merge import MergeReport

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_CHANGES_BASE = ("pissa", "olora")


class InputTypedLinear(nn.Linear):
    """A linear layer that multiplies in the type of its input, whatever type its weight is kept in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def attach(model: PreTrainedModel, settings: AdapterSettings, *, seed: int | None = None) -> PeftModel:
    """Freeze ``model`` and put a trainable adapter on it (in place); float32 adapter weights, see above.

    ``seed`` decides the adapter's random half, without touching the caller's random state; None draws from it.
    Raises UsageError listing every name in ``target_modules`` and ``modules_to_save`` that matches nothing.
    """
    targets = _checked_targets(model, settings.target_modules)
    saved, tied = _checked_saved(model, settings.modules_to_save)
    alpha = float(settings.lora_alpha)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # peft takes both
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        bias=settings.bias,
        init_lora_weights=settings.init_lora_weights,
        ensure_weight_tying=tied,
    )
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise UsageError(f"adapter: {error}") from error
    use_input_type(peft_model)
    if settings.init_lora_weights in _CHANGES_BASE:
        _keep_initial(peft_model)
    return peft_model


def merge_run(run_dir: str | Path, out: str | Path | None = None) -> MergeReport:
    """Merge a run's adapter (or an adapter folder) into its unquantized base, reloaded from disk: see merge.py."""
    from llmkit.modeling.merge import merge

    return merge(Path(run_dir), None if out is None else Path(out))


def use_input_type(peft_model: PeftModel) -> None:
    """Let every LoRA layer work in the type of its input, with its weights kept as they are."""
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for part in (*module.lora_A.values(), *module.lora_B.values()):
                if type(part) is nn.Linear:
                    part.__class__ = InputTypedLinear


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last names of the layers that can get an adapter, e.g. ``q_proj``; the output layer is not among them."""
    names = _linear_paths(model)
    return sorted({name.rpartition(".")[2] for name in names})


def load_adapter(
    folder: str | Path,
    *,
    dtype: str | None = None,
    trainable: bool = False,
    check_base: bool = True,
    device: str | None = None,
) -> tuple[PeftModel, BaseInfo, Path]:
    """An adapter on its base, reloaded from disk; gives the model, what the adapter says of its base, the base's folder.

    ``dtype`` None takes the base's own type, ``"trained"`` the one it had in training, quantized if it was; with any
    other the base is not quantized. ``device`` is where a quantized base goes (see ``open_model``). Raises MissingError when the
    adapter is not complete, the base is gone, or it is not the one the adapter was trained on (``check_base``).
    """
    path = Path(folder)
    config = _read_adapter(path)
    info = BaseInfo.read(path)
    name = str(config.base_model_name_or_path or "")
    if info is None:
        if not name:
            raise MissingError(f"{path / ADAPTER_CONFIG} does not say which model the adapter belongs to")
        info = BaseInfo(name, name, "", 0, "auto", config.revision)
    _, base_folder = find_base(info.name_or_path, info.path, info.revision)
    if check_base and info.digest:
        _check_digest(path, info, base_folder)
    wanted = info.dtype if dtype == "trained" else dtype or "auto"
    model = open_model(
        base_folder, dtype=wanted, quantization=info.quantized if dtype == "trained" else None, device=device
    )
    weights = path / ADAPTER_WEIGHTS
    _match_rows(model, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        try:
            peft_model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable, config=config)
        except (RuntimeError, ValueError, KeyError, UserWarning) as error:
            first = " ".join(str(error).split())[:400]
            raise MissingError(f"The adapter in {path} does not fit its base {base_folder}: {first}") from error
    use_input_type(peft_model)
    check_finite(peft_model, str(path))
    return peft_model, info, base_folder


def merge_weights(peft_model: PeftModel) -> PreTrainedModel:
    """Add the adapter to the base's weights, layer by layer in float32 with one rounding to their own type.

    Frees the adapter and gives back the bare model. Never for quantized weights: they would lose most of it.
    """
    for name, module in peft_model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base: Any = module.get_base_layer()
        if not base.weight.is_floating_point():
            raise UsageError(f"{name} has quantized weights: an adapter is merged into the unquantized base only")
        before: torch.dtype = base.weight.dtype
        base.weight.data = base.weight.data.float()
        module.merge(safe_merge=True)
        base.weight.data = base.weight.data.to(before)
    kind = _common_type(peft_model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: Any = peft_model.merge_and_unload()
    cast_weights(merged, kind)
    merged.tie_weights()
    return merged  # type: ignore[no-any-return]


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights as ``dtype``. Buffers stay as they are: a rotary embedding's frequencies are float32 in a model that was
    loaded in bfloat16 too, and rounded ones turn every position by another angle than the reopened model does.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _common_type(peft_model: PeftModel) -> torch.dtype:
    layers: Iterator[Any] = (m.get_base_layer() for m in peft_model.modules() if isinstance(m, LoraLayer))
    kind: torch.dtype = next(layers).weight.dtype
    return kind


def _checked_targets(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """The names in PEFT's form, each known to match a linear layer."""
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return "all-linear"
    paths, names = _linear_paths(model), linear_layers(model)
    every = {name for name, _ in model.named_modules()}
    if isinstance(targets, str):
        try:
            matched = {name for name in every if re.fullmatch(targets, name)}
        except re.error as error:
            raise UsageError(f"adapter.target_modules: {targets!r} is not a regular expression: {error}") from error
        if not matched & paths:
            raise UsageError(f"adapter.target_modules: the pattern {targets!r} matches no layer. {_there_are(names)}")
        if matched - paths:
            raise UsageError(
                f"adapter.target_modules: the pattern {targets!r} also matches {sorted(matched - paths)[0]}, "
                f"which cannot get an adapter. {_there_are(names)}"
            )
        return targets
    problems = [_target_problem(target, paths, every, names) for target in targets]
    found = [problem for problem in problems if problem]
    if found or not targets:
        what = "\n".join(found) or "adapter.target_modules is empty"
        raise UsageError(f"{what}\n{_there_are(names)}")
    return targets


def _target_problem(target: str, paths: set[str], every: set[str], names: list[str]) -> str:
    def matches(candidates: set[str]) -> bool:
        return any(name == target or name.endswith(f".{target}") for name in candidates)

    if matches(paths) and not matches(every - paths):
        return ""
    key = f"adapter.target_modules: {target!r}"
    if matches(every):
        return f"{key} is not a linear layer inside the model; to train embeddings or the output layer in full, name it in adapter.modules_to_save"
    near = difflib.get_close_matches(target, names, n=1)
    return f"{key} matches no layer." + (f" Did you mean {near[0]}?" if near else "")


def _checked_saved(model: PreTrainedModel, names: list[str]) -> tuple[list[str], bool]:
    """``modules_to_save`` and whether the adapter has to keep tied embeddings tied (peft #2898)."""
    every = {name for name, _ in model.named_modules() if name}
    unknown = [n for n in names if not any(m == n or m.endswith(f".{n}") for m in every)]
    if unknown:
        last = sorted({name.rpartition(".")[2] for name in every if not name.rpartition(".")[2].isdigit()})
        lines = [f"adapter.modules_to_save: {name!r} matches no layer" for name in unknown]
        raise UsageError("\n".join(lines) + f"\nThis model has {', '.join(last)}")
    _refuse_quantized(model, names)
    ends = _embedding_names(model)
    chosen = [name for name in names if name.rpartition(".")[2] in ends]
    if not chosen or not model.config.get_text_config().tie_word_embeddings:
        return list(names), False
    # One matrix under two names: the input embedding is trained, and PEFT ties the output layer to it.
    return [*(n for n in names if n not in chosen), ends[0]], True


def _refuse_quantized(model: PreTrainedModel, names: list[str]) -> None:
    for path, module in model.named_modules():
        name = next((n for n in names if path == n or path.endswith(f".{n}")), None)
        if name is not None and any(is_quantized(part) for part in module.modules()):
            raise UsageError(
                f"adapter.modules_to_save: {name!r} is quantized (model.quantization), so it cannot be trained in full. "
                "Remove it: it gets an adapter instead"
            )


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Last names of the input embedding and of the output layer."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = {id(module): name for name, module in model.named_modules()}
    return [paths[id(end)].rpartition(".")[2] for end in ends if end is not None]


def _linear_paths(model: PreTrainedModel) -> set[str]:
    output = model.get_output_embeddings()
    kinds = ("Linear", "Conv1D")
    return {
        name
        for name, module in model.named_modules()
        if (type(module).__name__ in kinds or is_quantized(module)) and module is not output
    }


def _there_are(names: list[str]) -> str:
    return f"This model's linear layers are {', '.join(names)}; all-linear takes them all"


def _keep_initial(peft_model: PeftModel) -> None:
    """PiSSA and OLoRA change the base; with the first adapter kept, the export can be one on the unchanged base."""
    folder = tempfile.mkdtemp(prefix="llmkit-adapter-")
    weakref.finalize(peft_model, shutil.rmtree, folder, ignore_errors=True)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    peft_model.__dict__["_llmkit_initial_adapter"] = folder


def _read_adapter(folder: Path) -> Any:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise MissingError(f"{folder} has no {ADAPTER_CONFIG}, so it is not an adapter")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise MissingError(f"{folder} is incomplete: it has no {ADAPTER_WEIGHTS}")
    check_safetensors(folder / ADAPTER_WEIGHTS)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise MissingError(f"{folder / ADAPTER_CONFIG} is damaged: {error}") from error
    if not isinstance(config, LoraConfig):
        raise UsageError(f"{folder} is a {config.peft_type} adapter; llmkit reads LoRA and DoRA")
    return config


def _check_digest(folder: Path, info: BaseInfo, base_folder: Path) -> None:
    here = model_digest(base_folder)
    if here != info.digest:
        raise MissingError(
            f"{base_folder} is not the model that the adapter {folder} was trained on: its digest is {here[:16]}…, "
            f"the run recorded {info.digest[:16]}…. Put the original back: on other weights the adapter means nothing"
        )


def _match_rows(model: PreTrainedModel, weights: Path) -> None:
    """An adapter that was trained with added tokens brings a longer embedding: make room for it."""
    from safetensors import safe_open

    rows = embedding_rows(model)
    name = _embedding_names(model)[0]
    with safe_open(str(weights), framework="pt") as file:
        keys = [key for key in file.keys() if re.search(rf"\.{name}\.(.*\.)?weight$", key)]  # noqa: SIM118  not a dict
        saved = max((int(file.get_slice(key).get_shape()[0]) for key in keys), default=rows)
    if saved > rows:
        model.resize_token_embeddings(saved, mean_resizing=False)
