"""How good is `llmkit plan`: predicted against measured peak memory of real runs, each in a process of its own.

    python benchmarks/plan_accuracy.py [--part known|held-out|all] [--only NAME ...] [--folder DIR [--score]]

Every setting is a real run of a few steps (data preparation, training, checkpoint, export), in a process that has imported
the libraries and nothing else; several processes are started by the command line. The prediction is the one that the run
itself made before it loaded anything, and both are read from its result.json. The first run, of the smallest model, tells
what a process holds without one; it is not counted. The constants of
llmkit/modeling/memory.py and llmkit/training/plan.py were chosen while looking at the settings called `known`; those
called `held-out` were looked at afterwards, and changed nothing. `--score` predicts anew for the runs that `--folder`
remembers, so that a change of the arithmetic can be judged without running anything.

Beside it: what `accelerate estimate-memory` and DeepSpeed's estimators say for the same model and processes, by their own
functions. Neither counts activations, logits or the process itself, so their errors are also given with the measured
process added. Errors are |predicted / measured - 1|; `above the process` leaves the process out on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPO, machine, write_result

DEMO = REPO / "models" / "smollm2-135m-instruct"
GSM8K = REPO.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
MODELS: dict[str, dict[str, Any]] = {
    "llama-13m": {"kind": "llama", "hidden": 256, "layers": 4, "heads": 4, "kv": 2, "inner": 688, "vocab": 40_000},
    "llama-29m": {"kind": "llama", "hidden": 384, "layers": 12, "heads": 6, "kv": 2, "inner": 1024, "vocab": 16_000},
    "qwen-54m": {"kind": "qwen3", "hidden": 512, "layers": 10, "heads": 8, "kv": 4, "inner": 1408, "vocab": 49_152},
    "llama-101m": {"kind": "llama", "hidden": 768, "layers": 12, "heads": 12, "kv": 4, "inner": 2048, "vocab": 32_000, "untied": True},
}  # fmt: skip
LORA = {"adapter": {"r": 16}}
SETTINGS: list[dict[str, Any]] = [
    {"name": "base", "model": "llama-13m", "length": 128, "batch": 1, "part": "base"},
    {"name": "135m 256x4", "model": "demo", "length": 256, "batch": 4, "part": "known"},
    {"name": "13m 512x4", "model": "llama-13m", "length": 512, "batch": 4, "part": "known"},
    {"name": "101m 256x4", "model": "llama-101m", "length": 256, "batch": 4, "part": "known"},
    {"name": "135m lora 256x4", "model": "demo", "length": 256, "batch": 4, "part": "held-out", **LORA},
    {"name": "54m qwen lora 1024x1", "model": "qwen-54m", "length": 1024, "batch": 1, "part": "known", **LORA},
    {"name": "29m fp32 256x4", "model": "llama-29m", "dtype": "float32", "length": 256, "batch": 4, "part": "held-out"},
    {"name": "135m fp32 256x1", "model": "demo", "dtype": "float32", "length": 256, "batch": 1, "part": "held-out"},
    {"name": "54m qwen 512x2", "model": "qwen-54m", "length": 512, "batch": 2, "part": "held-out"},
    {"name": "135m checkpointing 256x2", "model": "demo", "length": 256, "batch": 2, "checkpointing": True, "part": "known"},
    {"name": "101m mixed fp32+bf16 256x2", "model": "llama-101m", "dtype": "float32", "mixed": True, "length": 256, "batch": 2, "part": "known"},
    {"name": "29m accumulated 256x2", "model": "llama-29m", "length": 256, "batch": 2, "accumulation": 3, "part": "held-out"},
    {"name": "29m zero2 256x4", "model": "llama-29m", "length": 256, "batch": 4, "zero": "zero2", "part": "known"},
    {"name": "54m qwen zero3 512x2", "model": "qwen-54m", "length": 512, "batch": 2, "zero": "zero3", "part": "held-out"},
    {"name": "13m no parts 512x12", "model": "llama-13m", "length": 512, "batch": 12, "micro": 0, "part": "held-out"},
    {"name": "54m qwen no parts 512x5", "model": "qwen-54m", "length": 512, "batch": 5, "micro": 0, "part": "held-out"},
    {"name": "54m qwen checkpointing accumulated 256x2", "model": "qwen-54m", "length": 256, "batch": 2, "accumulation": 2, "checkpointing": True, "part": "held-out"},
    {"name": "101m fp32 128x2", "model": "llama-101m", "dtype": "float32", "length": 128, "batch": 2, "part": "held-out"},
    {"name": "29m zero3 256x4, 2 processes", "model": "llama-29m", "length": 256, "batch": 4, "zero": "zero3", "processes": 2, "part": "known"},
    {"name": "29m ddp 256x4, 2 processes", "model": "llama-29m", "length": 256, "batch": 4, "processes": 2, "part": "held-out"},
]  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """A model of random weights in bfloat16 with the demo model's tokenizer."""
    if name == "demo":
        return DEMO
    if not folder.is_dir():
        apart(lambda: make_model(name, folder), folder.parent / f"{name}.log")
    return folder


def apart(work: Callable[[], Any], log: Path) -> int:
    """Do it in a child of this process, which has the libraries imported already and nothing else; gives its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            work()
        code = 0
    except BaseException:  # noqa: BLE001  whatever it is, it ends the child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def make_model(name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

    m = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[m["kind"]]
    config = kind(
        vocab_size=max(m["vocab"], len(tokenizer)), hidden_size=m["hidden"], intermediate_size=m["inner"],
        num_hidden_layers=m["layers"], num_attention_heads=m["heads"], num_key_value_heads=m["kv"],
        head_dim=m["hidden"] // m["heads"], max_position_embeddings=2048, tie_word_embeddings=not m.get("untied", False),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(setting: dict[str, Any], model: Path, scratch: Path, steps: int) -> dict[str, Any]:
    train: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": setting["batch"], "logging_steps": 1, "sample_prompts": 0,
        "gradient_accumulation_steps": setting.get("accumulation", 1),
        "gradient_checkpointing": setting.get("checkpointing", False), "bf16": setting.get("mixed", False),
        "micro_batch_tokens": setting.get("micro", "auto"), "lr_scheduler_type": "constant", "learning_rate": 1e-5,
    }  # fmt: skip
    made: dict[str, Any] = {
        "name": "accuracy", "output_dir": str(scratch / "run"),
        "model": {"name_or_path": str(model), "dtype": setting.get("dtype", "bfloat16")},
        "data": {
            "train": str(few_rows(scratch.parent)), "columns": {"prompt": "question", "completion": "answer"}, "format": "prompt_completion",
            "max_length": setting["length"], "on_too_long": "drop", "packing": True, "cache_dir": str(scratch.parent / "tokens"),
        },
        "train": train, "tracking": {"enabled": False},
    }  # fmt: skip
    if "adapter" in setting:
        made["adapter"] = setting["adapter"]
    if "zero" in setting:
        made["deepspeed"] = setting["zero"]
    if setting.get("processes", 1) > 1:
        made["launch"] = {"processes": setting["processes"]}
    return made


def run(setting: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """One setting: what was predicted and measured, or why it failed."""
    model = build(setting["model"], folder / setting["model"])
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        given, log = recipe(setting, model, scratch, steps), scratch / "log.txt"
        stage = "lora" if "adapter" in setting else "sft"
        started = time.perf_counter()
        if setting.get("processes", 1) > 1:
            code = by_command_line(given, stage, scratch, log)
        else:
            code = apart(lambda: in_this_process(given, stage, scratch), log)
        if code:
            return {"failed": f"exit {code}: {log.read_text()[-1500:]}"}
        metrics = json.loads((scratch / "run" / "result.json").read_text())["metrics"]
    record = json.loads((folder / "cache" / "memory.jsonl").read_text().splitlines()[-1])
    return {
        "predicted": metrics["predicted_memory_host_bytes"], "measured": metrics["peak_memory_host_bytes"],
        "process": record["base"], "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def in_this_process(given: dict[str, Any], stage: str, scratch: Path) -> None:
    """The run, but for opening the exported model again in one more fresh process."""
    import llmkit
    from llmkit.training import outcome

    os.chdir(scratch)
    outcome.verify = lambda *_: None  # type: ignore[assignment]
    getattr(llmkit, stage)(given)


def by_command_line(given: dict[str, Any], stage: str, scratch: Path, log: Path) -> int:
    import yaml

    (scratch / "recipe.yaml").write_text(yaml.safe_dump(given))
    with log.open("w") as file:
        command = [sys.executable, "-m", "llmkit", stage, str(scratch / "recipe.yaml")]
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        return subprocess.run(command, stdout=file, stderr=file, cwd=scratch, env=environment, check=False).returncode


def few_rows(folder: Path) -> Path:
    """The first 800 rows: enough for a few steps."""
    path = folder / "rows.jsonl"
    if not path.exists():
        path.write_text("".join(GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)[:800]), encoding="utf-8")
    return path


def predict(setting: dict[str, Any], folder: Path, steps: int) -> float:
    """What `llmkit plan` says now, without running anything."""
    from llmkit import stages
    from llmkit.modeling.devices import device
    from llmkit.recipe import parse
    from llmkit.training.plan import make_plan

    os.environ["LLMKIT_CACHE"] = str(folder / "cache")
    stage = "lora" if "adapter" in setting else "sft"
    given = recipe(setting, build(setting["model"], folder / setting["model"]), folder / "nothing", steps)
    made = parse(given, stages.load(stage).Recipe)
    return make_plan(made, stage, device("cpu"), setting.get("processes", 1)).own.memory.host


def theirs(settings: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, float]]:
    """What accelerate and DeepSpeed say, in bytes a process, by their own functions."""
    request = [[s["name"], str(build(s["model"], folder / s["model"])), s] for s in settings]
    answer = folder / "theirs.json"
    log = folder / "theirs.log"
    known: dict[str, dict[str, float]] = json.loads(answer.read_text()) if answer.exists() else {}
    if {s["name"] for s in settings} <= known.keys():
        return known
    if apart(lambda: answer.write_text(json.dumps(ask_theirs(request))), log):
        raise SystemExit(log.read_text()[-2000:])
    found: dict[str, dict[str, float]] = json.loads(answer.read_text())
    return found


def ask_theirs(request: list[Any]) -> dict[str, dict[str, float]]:
    import torch
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for name, folder, setting in request:
        dtype = setting.get("dtype", "bfloat16")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
        total, _ = calculate_maximum_sizes(model)
        mixed = "bf16" if setting.get("mixed") else dtype if dtype != "bfloat16" else "float32"
        usage = estimate_training_usage(total, mixed if mixed == "bf16" else "float32")
        parameters = sum(p.numel() for p in model.parameters())
        largest = max(p.numel() for p in model.parameters())
        processes = setting.get("processes", 1)
        if setting.get("zero") == "zero3":
            _, gpu, _ = estimate_zero3_model_states_mem_needs(
                parameters,
                largest,
                num_gpus_per_node=processes,
                cpu_offload=False,
                cpu_offload_params=False,
                zero_init=False,
            )
        else:
            _, gpu = estimate_zero2_model_states_mem_needs(parameters, num_gpus_per_node=processes, cpu_offload=False)
        found[name] = {"accelerate": float(max(usage.values())), "deepspeed": float(gpu)}
    return found


def errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    def mean(values: list[float]) -> float:
        return round(statistics.mean(values), 4) if values else float("nan")

    def off(key: str, *, process: bool) -> list[float]:
        return [abs((r[key] + (r["process"] if process else 0)) / r["measured"] - 1) for r in rows]

    own = [abs(r["predicted"] / r["measured"] - 1) for r in rows]
    above = [abs((r["predicted"] - r["process"]) / (r["measured"] - r["process"]) - 1) for r in rows]
    return {
        "settings": len(rows), "mean": mean(own), "worst": round(max(own), 4), "mean above the process": mean(above),
        "accelerate": mean(off("accelerate", process=False)), "accelerate + process": mean(off("accelerate", process=True)),
        "deepspeed": mean(off("deepspeed", process=False)), "deepspeed + process": mean(off("deepspeed", process=True)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["known", "held-out", "all"], default="all")
    parser.add_argument("--only", nargs="*", help="names of settings")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep models, token cache and history here between calls")
    parser.add_argument("--score", action="store_true", help="predict anew for the runs in --folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, args.folder or Path(scratch))


def measure(args: argparse.Namespace, folder: Path) -> None:
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "LLMKIT_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    if not args.score:
        import llmkit.training.run  # noqa: F401  once, for all runs: they are children of this process
    chosen = [s for s in SETTINGS if s["part"] == "base" or args.part in ("all", s["part"])]
    if args.only:
        chosen = [s for s in chosen if s["name"] in args.only or s["part"] == "base"]
    if (folder / "cache" / "memory.jsonl").exists():
        chosen = [s for s in chosen if s["part"] != "base"]
    rows: list[dict[str, Any]] = []
    kept = folder / "runs.jsonl"
    known = {r["name"]: r for r in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    if args.score:
        chosen = [s for s in SETTINGS if s["name"] in known and args.part in ("all", s["part"])]
    for setting in chosen:
        if args.score:
            found = known[setting["name"]]
            found["predicted"] = predict(setting, folder, found.get("steps", args.steps))
        else:
            found = run(setting, folder, args.steps)
            if "failed" not in found:
                with kept.open("a") as file:
                    file.write(json.dumps({"name": setting["name"], "steps": args.steps, **found}) + "\n")
        row = setting | found
        if "failed" in row:
            print(f"{setting['name']}: {row['failed']}", flush=True)
        else:
            error = row["predicted"] / row["measured"] - 1
            print(
                f"{setting['name']:>44}: predicted {row['predicted'] / 1e9:5.2f} GB, measured {row['measured'] / 1e9:5.2f} GB, "
                f"{error:+6.1%}, process {row['process'] / 1e9:.2f} GB, {row['seconds']:.0f} s", flush=True,
            )  # fmt: skip
        rows.append(row)
    beside = theirs([s for s in chosen if s["part"] != "base"], folder)
    rows = [row | beside.get(row["name"], {}) for row in rows]
    counted = [r for r in rows if r["part"] != "base" and "failed" not in r]
    parts = {part: [r for r in counted if r["part"] == part] for part in ("known", "held-out")}
    summary = {part: errors(found) for part, found in {**parts, "all": counted}.items() if found}
    print(json.dumps(summary, indent=1))
    if not args.only and args.part == "all":
        packages = ("torch", "transformers", "peft", "accelerate", "deepspeed")
        write_result(
            "plan_accuracy", {"machine": machine(*packages), "steps": args.steps, "summary": summary, "runs": rows}
        )


if __name__ == "__main__":
    main()
