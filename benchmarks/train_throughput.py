"""Training speed and memory beside TRL's SFTTrainer (and PEFT), on the same rows, model, length and batch of tokens.

    python benchmarks/train_throughput.py full [--steps 100] [--rounds 1]
    python benchmarks/train_throughput.py lora [--steps 100]

GSM8K, packed to 512 tokens, 4 sequences a step, bfloat16 weights, AdamW, no dropout. Each side runs in a process of
its own, one after the other, alternating over the rounds; llmkit through its own command line's runner with everything
that a run does (tracking to disk only), TRL with what it is fastest with on this machine: packing, its chunked loss, no
activation checkpointing. Two more settings of TRL trade speed for memory: one sequence at a time with four accumulated,
and activation checkpointing.

The clock covers the training steps only (not imports, data preparation, evaluation or saving); the first steps, in
which kernels are chosen, are left out. Useful tokens are those that the loss learns from. Memory is the highest
resident set of the process up to the end of training. ``limit`` is what the machine's measured bfloat16 matrix product
would allow for the same work, see ``matrix_limit``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import machine, write_result
from training_run import DATA, LENGTH, MODEL, add_hidden, in_own_process, peak_gb, recipe, timed, watched

SEQUENCES, WARM = 4, 5
RATE = {"full": 2e-5, "lora": 2e-4}
TRL = {
    "trl": {"per_device_train_batch_size": SEQUENCES, "gradient_accumulation_steps": 1, "gradient_checkpointing": False},
    "trl, 1 sequence x 4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SEQUENCES, "gradient_checkpointing": False},
    "trl, checkpointing": {"per_device_train_batch_size": SEQUENCES, "gradient_accumulation_steps": 1, "gradient_checkpointing": True},
}  # fmt: skip


def rows(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Conversations that fit the length."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        prompt, answer = (
            [{"role": "user", "content": raw["question"]}],
            [{"role": "assistant", "content": raw["answer"]}],
        )
        if len(tokenizer.apply_chat_template(prompt + answer, tokenize=True, return_dict=False)) <= LENGTH:
            found.append({"prompt": prompt, "completion": answer})
    return found


def run_llmkit(args: argparse.Namespace) -> dict[str, Any]:
    what = recipe(
        args.scratch, sequences=SEQUENCES, steps=args.steps, rate=RATE[args.kind], model=args.model, data=args.data
    )
    if args.kind == "lora":
        what["adapter"] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    return watched("lora" if args.kind == "lora" else "sft", what, warm=WARM)


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    config = SFTConfig(
        output_dir=str(args.scratch / "run"), max_steps=args.steps, learning_rate=RATE[args.kind], use_cpu=True, bf16=False,
        max_length=LENGTH, packing=True, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, optim="adamw_torch_fused", completion_only_loss=True, **TRL[args.side],
    )  # fmt: skip
    steps: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append({"start": time.perf_counter(), "tokens": 0, "useful": 0})

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            steps[-1]["tokens"] += int(
                (inputs["attention_mask"] if "attention_mask" in inputs else inputs["input_ids"] >= 0).sum()
            )
            steps[-1]["useful"] += int((inputs["labels"] != -100).sum())
            return super().training_step(model, inputs, num_items_in_batch)

    lora = (
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if args.kind == "lora"
        else None
    )
    data = Dataset.from_list(rows(args.data, tokenizer))
    trainer = Counting(
        model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return timed(steps, losses, WARM) | {"peak_gb": peak_gb()}


def matrix_limit(args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s at the measured rate of a bfloat16 product of the model's own shapes, were there nothing else to do.

    6 FLOP (LoRA: 4, no weight gradients) a weight and token, the output layer at the useful share of the tokens.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model)
    hidden, inner = config.hidden_size, config.intermediate_size
    x, w = torch.randn(LENGTH, hidden).bfloat16(), torch.randn(inner, hidden).bfloat16()
    rates = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(200):
            torch.nn.functional.linear(x, w)
        rates.append(200 * 2 * LENGTH * hidden * inner / (time.perf_counter() - begin))
    rate = statistics.median(rates)
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    body = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    head = hidden * config.vocab_size
    return {"gflops": rate / 1e9, "per_weight": 6.0 if args.kind == "full" else 4.0, "body": body, "head": head}


def child(args: argparse.Namespace, side: str) -> dict[str, Any]:
    options = [args.kind, "--steps", str(args.steps), "--model", str(args.model), "--data", str(args.data)]
    found = in_own_process(__file__, side, *options)
    print(f"{side:>20}: {found.get('tokens_per_second', 0):7.0f} tokens/s, {found.get('useful_tokens_per_second', 0):7.0f} useful, "
          f"{found.get('peak_gb', 0):.2f} GB, loss {statistics.mean(found.get('losses', [0])[-10:]):.4f}", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["full", "lora"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--more", type=int, default=15, help="steps of TRL's memory-saving settings; 0 leaves them out")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    add_hidden(parser)
    args = parser.parse_args()
    args.model, args.data = args.model.resolve(), args.data.resolve()
    if args.side:
        sides = {"llmkit": run_llmkit, "limit": matrix_limit}
        print(json.dumps(sides.get(args.side, run_trl)(args)))
        return
    compare(args)


def compare(args: argparse.Namespace) -> None:
    limit = child(args, "limit")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("llmkit", *TRL)}
    for _ in range(args.rounds):
        for side in ("llmkit", "trl"):
            runs[side].append(child(args, side))
    steps, args.steps = args.steps, args.more
    for side in list(TRL)[1:] if args.more else []:
        runs[side].append(child(args, side))
    ours, theirs = (
        {k: statistics.median(run[k] for run in runs[side]) for k in runs[side][0] if k not in ("losses", "metrics")}
        for side in ("llmkit", "trl")
    )
    share = ours["useful_tokens_per_second"] / ours["tokens_per_second"]
    possible = limit["gflops"] * 1e9 / (limit["per_weight"] * (limit["body"] + share * limit["head"]))
    losses = [statistics.mean(runs[side][-1]["losses"][-20:]) for side in ("llmkit", "trl")]
    summary = {
        "speed_ratio": ours["useful_tokens_per_second"] / theirs["useful_tokens_per_second"],
        "memory_ratio": ours["peak_gb"] / theirs["peak_gb"],
        "loss_of_last_20_steps": dict(zip(("llmkit", "trl"), losses, strict=True)),
        "limit_tokens_per_second": possible,
        "share_of_limit": ours["tokens_per_second"] / possible,
    }
    print(json.dumps(summary, indent=1))
    packages = ("torch", "transformers", "trl", "peft")
    write_result(
        f"train_throughput_{args.kind}",
        {"machine": machine(*packages), "steps": steps, "summary": summary, "limit": limit, "runs": runs},
    )


if __name__ == "__main__":
    main()
