"""``llmkit merge``: a run's adapter added to its base model, shown to be the same model, saved as a model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llmkit.errors import GateError, MissingError, UsageError
from llmkit.modeling.adapters import ADAPTER_CONFIG, cast_weights, load_adapter, merge_weights
from llmkit.modeling.export import save_model, take_probe, verify
from llmkit.modeling.locate import model_digest, saved_dtype
from llmkit.modeling.probe import difference, logits_of, probe_ids, tolerance
from llmkit.modeling.tokenizer import open_tokenizer, stop_ids


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what, and how close the result is.

    ``difference`` is how far merged and unmerged logits are apart in float32 (``tolerance`` is the bound), relative
    to their spread; ``rounding`` the same after the weights were rounded to ``dtype``; ``effect`` how far the adapter
    itself moves the base's logits, to compare with. ``quantization`` says that the base was quantized in training; it
    is merged into unquantized all the same.
    """

    output: str
    adapter: str
    base: str
    base_digest: str
    base_checked: bool
    dtype: str
    difference: float
    tolerance: float
    rounding: float
    effect: float
    quantization: str | None = None


def merge(run_dir: Path, out: Path | None = None) -> MergeReport:
    """Merge the adapter of ``run_dir`` (a run, or an adapter folder) and save it in ``out`` (``RUN/merged``).

    Needs 4 bytes of memory for every weight: the comparison is made in float32, because a bfloat16 model is further
    from itself than a short training moves it. Raises MissingError (no adapter, base gone or changed), UsageError
    (``out`` exists), GateError (the merged model is not the unmerged one).
    """
    adapter = _adapter_folder(run_dir)
    target = out if out is not None else (run_dir if adapter != run_dir else adapter.parent) / "merged"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already; it is not overwritten. Give another --output, or remove it")
    tokenizer = open_tokenizer(adapter)
    peft_model, info, base_folder = load_adapter(adapter, dtype="float32")
    dtype, trained = saved_dtype(base_folder), info.quantized
    ids = probe_ids(tokenizer)
    unmerged = logits_of(peft_model, ids)
    with peft_model.disable_adapter():
        base = logits_of(peft_model, ids)
    model = merge_weights(peft_model)
    merged = difference(unmerged, logits_of(model, ids))
    bound = tolerance("float32")
    if not merged.relative <= bound:
        raise GateError(
            f"Merging {adapter} into {base_folder} changed the model: logits differ by {merged.relative:.2%} "
            f"(at most {bound:.1%} is rounding). Nothing was written"
        )
    _round_weights(model, getattr(torch, dtype))
    rounded = difference(unmerged, logits_of(model, ids))
    cast_weights(model, getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    probe = take_probe(model, tokenizer)
    save_model(model, tokenizer, target, stop_ids=_stops(adapter, tokenizer, base_folder))
    verify(target, probe)
    return MergeReport(
        output=str(target),
        adapter=str(adapter),
        base=str(base_folder),
        base_digest=info.digest or model_digest(base_folder),
        base_checked=bool(info.digest),
        dtype=dtype,
        difference=merged.relative,
        tolerance=bound,
        rounding=rounded.relative,
        effect=difference(unmerged, base).relative,
        quantization=f"{trained.type} in training; merged into the unquantized base" if trained else None,
    )


def _adapter_folder(run_dir: Path) -> Path:
    for folder in (run_dir / "adapter", run_dir):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if (run_dir / "model" / "config.json").is_file():
        raise UsageError(
            f"{run_dir} trained all weights: {run_dir / 'model'} is a whole model, there is nothing to merge"
        )
    raise MissingError(f"{run_dir} has no adapter/: it is not a finished adapter run")


def _round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """What saving in ``dtype`` does to the weights, one at a time."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def _stops(adapter: Path, tokenizer: Any, base_folder: Path) -> tuple[int, ...]:
    if not (adapter / "generation_config.json").is_file():
        return stop_ids(None, tokenizer, base_folder)
    eos = GenerationConfig.from_pretrained(str(adapter)).eos_token_id
    configured = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(int(i) for i in configured) or stop_ids(None, tokenizer, base_folder)
