"""A training run of llmkit that is watched: tokens/s of its steps, its highest memory, its losses. What benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import REPO

LENGTH = 512
MODEL = REPO / "models" / "smollm2-135m-instruct"
DATA = REPO.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def recipe(
    scratch: Path, *, sequences: int, steps: int, rate: float, model: Path = MODEL, data: Path = DATA
) -> dict[str, Any]:
    """GSM8K packed to 512 tokens, ``sequences`` of them a step, bfloat16, AdamW at a constant rate, nothing saved between."""
    return {
        "name": "watched",
        "output_dir": str(scratch / "run"),
        "model": {"name_or_path": str(model), "dtype": "bfloat16"},
        "data": {
            "train": str(data), "columns": {"prompt": "question", "completion": "answer"}, "format": "prompt_completion",
            "max_length": LENGTH, "on_too_long": "drop", "packing": True, "cache_dir": str(scratch / "tokens"),
        },
        "train": {
            "max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": sequences,
            "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "logging_steps": 1, "save_steps": 10**6, "sample_prompts": 0,
        },
        "tracking": {"enabled": False},
    }  # fmt: skip


def watched(stage: str, what: dict[str, Any], *, warm: int) -> dict[str, Any]:
    """Run ``what`` in this process; see :func:`timed`. ``peak_gb`` is up to the last step, before saving and export."""
    import llmkit
    from llmkit.training.trainer import LlmkitTrainer

    steps: list[dict[str, float]] = []
    memory: list[float] = []
    own = LlmkitTrainer.training_step

    def step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        steps.append({"start": time.perf_counter(), "tokens": inputs.tokens, "useful": inputs.supervised})
        memory.append(peak_gb())
        return own(self, model, inputs, num_items_in_batch)

    LlmkitTrainer.training_step = step  # type: ignore[method-assign]
    result = getattr(llmkit, stage)(what)
    lines = [json.loads(line) for line in (Path(what["output_dir"]) / "log.jsonl").read_text("utf-8").splitlines()]
    losses = [e["metrics"]["loss"] for e in lines if e["event"] == "metrics" and "loss" in e["metrics"]]
    return timed(steps, losses, warm) | {"peak_gb": memory[-1], "metrics": result.metrics}


def timed(steps: list[dict[str, float]], losses: list[float], warm: int) -> dict[str, Any]:
    """Rates over the steps after the first ``warm``: the median over steps, and all of them together."""
    pairs = list(zip(steps[warm:], steps[warm + 1 :], strict=False))
    seconds = [b["start"] - a["start"] for a, b in pairs]
    return {
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": statistics.median(a["tokens"] / s for (a, _), s in zip(pairs, seconds, strict=True)),
        "useful_tokens_per_second": statistics.median(
            a["useful"] / s for (a, _), s in zip(pairs, seconds, strict=True)
        ),
        "useful_tokens_per_second_overall": sum(a["useful"] for a, _ in pairs) / sum(seconds),
        "tokens_per_step": statistics.mean(a["tokens"] for a, _ in pairs),
        "losses": [round(loss, 4) for loss in losses],
    }


def peak_gb() -> float:
    """The highest resident set of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e6


def in_own_process(script: str, side: str, *options: str) -> dict[str, Any]:
    """``python SCRIPT OPTIONS --side SIDE --scratch DIR``; the last line of its stdout is its finding."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, script, *options, "--side", side, "--scratch", scratch]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def add_hidden(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`in_own_process`."""
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
