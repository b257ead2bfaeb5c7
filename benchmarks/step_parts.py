"""The figures of docs/decisions/own-the-step.md: parts of a batch, the allocator, and what dropout costs under LoRA.

    python benchmarks/step_parts.py [--steps 5]

GSM8K on SmolLM2-135M, bfloat16. Full fine-tuning with 4,096 tokens a step, run in parts of 512 to 4,096
(``train.micro_batch_tokens``), and in parts of 2,048 with glibc's allocator as it comes; LoRA with 2,048 tokens a step,
with and without dropout, in llmkit's layer and in PEFT's. Each in a process of its own, one after the other; the first
two steps, in which kernels are chosen, are left out. Writes benchmarks/results/step_parts-<date>.json.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from typing import Any

from common import machine, write_result
from training_run import add_hidden, in_own_process, recipe, watched

WARM = 2
PARTS = {f"parts of {tokens}": tokens for tokens in (512, 1024, 2048, 4096)}
ALLOCATOR = "parts of 2048, glibc's own allocator"
LORA = {
    "lora": (0.0, True), "lora, dropout": (0.05, True),
    "lora, PEFT's layer": (0.0, False), "lora, PEFT's layer, dropout": (0.05, False),
}  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    import llmkit.training.run as module

    swapped: Any = module
    if args.side == ALLOCATOR:
        swapped.keep_freed_memory = lambda: False
    if args.side in LORA:
        dropout, lean = LORA[args.side]
        if not lean:
            swapped.lean_adapters = nullcontext
        what = recipe(args.scratch, sequences=4, steps=args.steps + WARM + 1, rate=2e-4)
        return watched("lora", what | {"adapter": {"lora_dropout": dropout}}, warm=WARM)
    what = recipe(args.scratch, sequences=8, steps=args.steps + WARM + 1, rate=2e-5)
    what["train"]["micro_batch_tokens"] = PARTS.get(args.side, 2048)
    return watched("sft", what, warm=WARM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    add_hidden(parser)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    found = {}
    for side in (*PARTS, ALLOCATOR, *LORA):
        found[side] = in_own_process(__file__, side, "--steps", str(args.steps))
        figures = {key: found[side][key] for key in ("seconds_per_step", "tokens_per_second", "peak_gb")}
        print(f"{side:>38}: " + ", ".join(f"{value:.2f} {key}" for key, value in figures.items()), flush=True)
    write_result(
        "step_parts", {"machine": machine("torch", "transformers", "peft"), "steps": args.steps, "runs": found}
    )


if __name__ == "__main__":
    main()
