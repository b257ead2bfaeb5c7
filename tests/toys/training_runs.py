"""What the tests of training share: a small recipe, and what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmkit import api
from llmkit.context import Result

Tensors = dict[str, torch.Tensor]
SUMS = [
    {"prompt": f"What is {a} + {b}?", "completion": f"{a + b}" if b % 2 else f"{a} + {b} is {a + b}. " * (1 + b)}
    for a in range(7)
    for b in range(3)
]


def recipe(folder: Path, model: Path, *, data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """21 rows of very unequal lengths, batches of 4, 12 steps in 2 epochs unless told otherwise."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return {
        "name": "sums", "output_dir": str(folder / "out"), "seed": 3,
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 128, "cache_dir": str(folder / "cache")} | (data or {}),
        "train": {
            "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
            "sample_prompts": 0, "save_total_limit": None,
        } | train,
        "tracking": {"enabled": False},
    }  # fmt: skip


def history(out: Path, key: str = "loss") -> dict[int, float]:
    """What the newest checkpoint says was logged."""
    newest = max((out / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    state = json.loads((newest / "trainer_state.json").read_text())
    return {entry["step"]: entry[key] for entry in state["log_history"] if key in entry}


def logged(out: Path, key: str) -> dict[int, float]:
    """What log.jsonl says, of all starts of the run together."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        values = line.get("metrics") or {}
        if key in values and line.get("step"):
            found[line["step"]] = values[key]
    return found


def weights(out: Path) -> Tensors:
    folder = out / "adapter" if (out / "adapter").exists() else out / "model"
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def assert_identical(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 3
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def assert_close(a: Tensors, b: Tensors, tolerance: float) -> None:
    assert a.keys() == b.keys()
    far = {n: float((a[n] - b[n]).abs().max()) for n in a if not torch.allclose(a[n], b[n], rtol=0, atol=tolerance)}
    assert not far


def run(what: dict[str, Any], name: str, stage: str = "sft", **overrides: Any) -> Result:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    out = str(Path(what["output_dir"]).with_name(name))
    return api.run(stage, what, keys, output_dir=out)


def overfitting(folder: Path, model: Path, **train: Any) -> dict[str, Any]:
    """Held-out rows that training makes worse after a while."""
    held_out = folder / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row | {"completion": "한국어 中文 Zwölf"}) + "\n" for row in SUMS[:4]))
    return recipe(
        folder, model, data={"eval": str(held_out)},
        **{"num_train_epochs": 20, "eval_steps": 2, "save_steps": 4, "learning_rate": 2e-2, "lr_scheduler_type": "constant"} | train,
    )  # fmt: skip
