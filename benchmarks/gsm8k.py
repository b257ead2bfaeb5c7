"""GSM8K on SmolLM2-135M: 150 steps of LoRA and 100 of full fine-tuning, 2,048 tokens a step, held-out loss and answers.

    python benchmarks/gsm8k.py [--lora-steps 150] [--full-steps 100]

The shipped recipes recipes/{lora,sft}/gsm8k-demo.yaml with the number of steps set; 2 % of the training rows are held
out. Writes benchmarks/results/gsm8k-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPO, machine, write_result


def run(stage: str, steps: int, scratch: Path) -> dict[str, Any]:
    """The result of the shipped recipe, cut to ``steps`` steps of 4 x 512 tokens."""
    overrides = [f"train.max_steps={steps}", "train.per_device_train_batch_size=4", "tracking.enabled=false"]
    command = [sys.executable, "-m", "llmkit", stage, f"recipes/{stage}/gsm8k-demo.yaml", *overrides]
    command += ["--output-dir", str(scratch / stage), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=REPO, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    result.pop("output_dir")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora-steps", type=int, default=150)
    parser.add_argument("--full-steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            "lora": run("lora", args.lora_steps, Path(scratch)),
            "full": run("sft", args.full_steps, Path(scratch)),
        }
    for name, result in runs.items():
        metrics = result["metrics"]
        print(f"{name}: held-out loss {metrics['eval_loss_before']:.4f} → {metrics['eval_loss_after']:.4f}, "
              f"{metrics['tokens_per_second']:.0f} tokens/s")  # fmt: skip
    write_result("gsm8k", {"machine": machine("torch", "transformers", "peft"), "runs": runs})


if __name__ == "__main__":
    main()
