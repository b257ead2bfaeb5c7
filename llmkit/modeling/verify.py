"""``python -m llmkit.modeling.verify FOLDER PROBE``: reopen an exported folder; the last line of stdout is the finding.

A process of its own, because a training process is no fair judge: its memory holds the weights, and DeepSpeed leaves
switches behind that change how models load.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # transformers imports these two where it finds them, for parts that are not used here: a third of the start.
    sys.modules["sklearn"] = sys.modules["scipy"] = None  # type: ignore[assignment]

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import LlmkitError
from llmkit.modeling.load import open_model
from llmkit.modeling.locate import BaseInfo, find_base, weight_files
from llmkit.modeling.probe import OTHER_DEVICE, Probe, difference, dtype_name, logits_of, tolerance
from llmkit.modeling.tokenizer import open_tokenizer


def inspect_folder(folder: Path, probe: Probe) -> tuple[list[str], dict[str, Any]]:
    """Everything that is wrong with ``folder`` (empty when it is sound), and the figures of the comparison."""
    started = time.monotonic()
    try:
        model = _open(folder, probe.device)
        tokenizer = open_tokenizer(folder)
    except LlmkitError as error:
        return [str(error)], {}
    problems = _structure(model, len(tokenizer))
    if problems:
        return problems, {}
    model = _to_device(model, probe.device)
    gap = difference(probe.logits, logits_of(model, probe.input_ids))
    same_device = next(model.parameters()).device.type == probe.device
    allowed = tolerance(dtype_name(model), slack=max(probe.slack, 1.0 if same_device else OTHER_DEVICE))
    if not gap.relative <= allowed:
        problems.append(
            f"its logits differ from those of the model in memory by {gap.relative:.2%} (at most {gap.largest:.3g}); "
            f"{allowed:.1%} is what rounding in {dtype_name(model)} explains"
        )
    report = {
        "relative": gap.relative,
        "largest": gap.largest,
        "tolerance": allowed,
        "dtype": dtype_name(model),
        "seconds": round(time.monotonic() - started, 3),
    }
    return problems, report


def _open(folder: Path, device: str) -> Any:
    if (folder / "adapter_config.json").is_file():
        # peft is imported for adapters only: it costs as much as a small model takes to check.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it misses an unused kernel
        from llmkit.modeling.adapters import load_adapter

        return load_adapter(folder, dtype="trained", check_base=False, device=_quantized_on(folder, device))[0]
    return open_model(folder)


def _structure(model: Any, tokens: int) -> list[str]:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    problems = []
    first, last = bare.get_input_embeddings(), bare.get_output_embeddings()
    rows = first.weight.shape[0]
    if rows < tokens:
        problems.append(f"its embedding has {rows} rows, but its tokenizer {tokens} tokens")
    if rows != bare.config.get_text_config().vocab_size:
        problems.append(
            f"its embedding has {rows} rows, but config.json says {bare.config.get_text_config().vocab_size}"
        )
    if last is not None and last.weight.shape[0] != rows:
        problems.append(f"its output layer has {last.weight.shape[0]} rows, its embedding {rows}")
    tied = bare.config.get_text_config().tie_word_embeddings
    if tied and last is not None and last.weight.data_ptr() != first.weight.data_ptr():
        problems.append(
            "config.json says that input and output embeddings are one, but they are two different matrices"
        )
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        problems.append("it has weights of size 0")
    return problems


def _quantized_on(folder: Path, device: str) -> str:
    """Where a quantized base is quantized: as in training, where there is room for its files unquantized."""
    if device != "cuda" or not torch.cuda.is_available():
        return "cpu"
    info = BaseInfo.read(folder)
    if info is None or info.quantization is None:
        return "cpu"
    size = sum(file.stat().st_size for file in weight_files(find_base(info.name_or_path, info.path, info.revision)[1]))
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if free > size + 2**30 else "cpu"


def _to_device(model: Any, device: str) -> Any:
    """The device of the training, where the training has left enough room for a second copy; else the CPU."""
    if device != "cuda" or not torch.cuda.is_available():
        return model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    free, _ = torch.cuda.mem_get_info()
    return model.to("cuda") if free > 1.3 * size + 2**30 else model


def main(arguments: list[str]) -> int:
    folder, file = Path(arguments[0]), Path(arguments[1])
    problems, report = inspect_folder(folder, Probe.load(file))
    print(json.dumps({"problems": problems, "report": report}), flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
