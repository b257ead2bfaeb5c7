"""LoRA over a base in bfloat16, in 4 bits and in 8, and the 4-bit one by PEFT and TRL: memory, time, what is learned.

    python benchmarks/qlora.py [--steps 16]

GSM8K on SmolLM2-135M, packed to 512 tokens, 4 sequences a step, rank 16 on all linear layers, no dropout. llmkit through
its own runner; TRL with what it is used with for QLoRA: PEFT's ``prepare_model_for_kbit_training`` (which SFTTrainer
calls), packing, without activation checkpointing as here. Each side has a process of its own. The held-out loss is that
of the same 32 rows of GSM8K's test set for every side, measured by one loop on the model itself: before training, after
it, and after merging into the unquantized base. Memory is the highest resident set up to the last training step.
Writes benchmarks/results/qlora-<date>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import Quiet, machine, write_result
from training_run import DATA, LENGTH, MODEL, add_hidden, in_own_process, peak_gb, recipe, timed, watched

SEQUENCES, WARM, RATE, HELD_OUT = 4, 2, 2e-4, 32
QUANTIZATION = {"llmkit bf16": None, "llmkit nf4": "nf4", "llmkit int8": "int8"}
TRL = "peft + trl nf4"
COLUMNS = {"prompt": "question", "completion": "answer"}


def run_llmkit(args: argparse.Namespace) -> dict[str, Any]:
    """Train, export and merge by llmkit; the losses by :func:`held_out_loss` on what it wrote."""
    import torch

    from llmkit.modeling.adapters import load_adapter, merge_run
    from llmkit.modeling.load import open_model
    from llmkit.modeling.quantized import memory_of
    from llmkit.modeling.settings import ModelSettings

    kind: Any = QUANTIZATION[args.side]
    what = recipe(args.scratch, sequences=SEQUENCES, steps=args.steps, rate=RATE)
    what["model"]["quantization"] = kind
    found = watched("lora", what, warm=WARM)
    base = open_model(MODEL, quantization=ModelSettings(name_or_path="x", quantization=kind).quantized)
    found |= {"weights_mb": memory_of(base) / 1e6, "held_out_before": held_out_loss(base, args.scratch)}
    trained, _, _ = load_adapter(args.scratch / "run" / "adapter", dtype="trained")
    report = merge_run(args.scratch / "run")
    merged = open_model(report.output, dtype="bfloat16")
    assert not any(p.dtype == torch.uint8 for p in merged.parameters())
    return found | {
        "held_out_after": held_out_loss(trained, args.scratch),
        "held_out_merged": held_out_loss(merged, args.scratch),
        "merge_difference": report.difference,
    }


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    """The same by PEFT and TRL."""
    import time

    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from llmkit.modeling.quantized import memory_of

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": quantization}
    before = held_out_loss(AutoModelForCausalLM.from_pretrained(MODEL, **kwargs), args.scratch)
    model = AutoModelForCausalLM.from_pretrained(MODEL, **kwargs)
    weights = memory_of(model) / 1e6
    steps: list[dict[str, float]] = []
    memory: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append({"start": time.perf_counter(), "tokens": 0, "useful": 0})
            memory.append(peak_gb())

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            steps[-1]["tokens"] += int(inputs["labels"].numel())
            steps[-1]["useful"] += int((inputs["labels"] != -100).sum())
            return super().training_step(model, inputs, num_items_in_batch)

    config = SFTConfig(
        output_dir=str(args.scratch / "run"), max_steps=args.steps, learning_rate=RATE, use_cpu=True, bf16=False,
        max_length=LENGTH, packing=True, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, optim="adamw_torch_fused", completion_only_loss=True,
        per_device_train_batch_size=SEQUENCES, gradient_checkpointing=False,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    trainer = Counting(
        model, args=config, train_dataset=Dataset.from_list(conversations()), processing_class=tokenizer,
        peft_config=lora, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(args.scratch / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, **kwargs), args.scratch / "adapter")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16), args.scratch / "adapter"
    )
    return timed(steps, losses, WARM) | {
        "peak_gb": memory[-1],
        "weights_mb": weights,
        "held_out_before": before,
        "held_out_after": held_out_loss(again, args.scratch),
        "held_out_merged": held_out_loss(plain.merge_and_unload(), args.scratch),
    }


def conversations() -> list[dict[str, Any]]:
    """The training rows in TRL's form."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [
        {"prompt": [{"role": "user", "content": row["question"]}], "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in rows
    ]  # fmt: skip


def held_out_loss(model: Any, scratch: Path) -> float:
    """Mean loss of a supervised token of the first rows of GSM8K's test set, a row at a time, in training mode without
    dropout: there bitsandbytes' own 4-bit layers leave their weights alone.
    """
    import torch
    from transformers import AutoTokenizer

    from llmkit.data.prepare import prepare
    from llmkit.data.render import Renderer
    from llmkit.data.settings import DataSettings

    rows = scratch / "held-out.jsonl"
    lines = (DATA.parent / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows.write_text("\n".join(lines[:HELD_OUT]) + "\n", encoding="utf-8")
    settings = DataSettings(
        train=str(rows), columns=COLUMNS, format="prompt_completion", max_length=LENGTH, cache_dir=str(scratch / "tokens")
    )  # fmt: skip
    renderer = Renderer(AutoTokenizer.from_pretrained(MODEL))
    store = prepare(settings, renderer, seed=0, output_dir=scratch / "held-out", progress=Quiet()).train
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(store)):
            ids, labels = (torch.from_numpy(part.astype("int64")) for part in store.row(index))
            logits = model.train()(input_ids=ids[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100))
            tokens += int((labels[1:] != -100).sum())
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    add_hidden(parser)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_trl(args) if args.side == TRL else run_llmkit(args)))
        return
    found = {}
    for side in (*QUANTIZATION, TRL):
        found[side] = in_own_process(__file__, side, "--steps", str(args.steps))
        figures = ("weights_mb", "peak_gb", "seconds_per_step", "held_out_before", "held_out_after", "held_out_merged")
        print(f"{side:>16}: " + ", ".join(f"{key} {found[side][key]:.4g}" for key in figures), flush=True)
    packages = ("torch", "transformers", "bitsandbytes", "peft", "trl")
    write_result(
        "qlora", {"machine": machine(*packages), "steps": args.steps, "held_out_rows": HELD_OUT, "runs": found}
    )


if __name__ == "__main__":
    main()
