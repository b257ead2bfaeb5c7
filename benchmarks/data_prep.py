"""Data preparation against TRL's: tokenize, mask and pack GSM8K (1.6 million tokens), each in a process of its own.

    python benchmarks/data_prep.py [--rounds 3] [--model models/smollm2-135m-instruct] [--data ../shared/data/gsm8k/train.jsonl]

llmkit is timed over everything from the file to packed sequences: digest, reading, rendering, tokenizing, Arrow cache,
report, histogram, packing. TRL's SFTTrainer is timed over its own ``_prepare_dataset`` alone, on rows already loaded and
converted, with completion-only loss and packing, with one and with two processes. Imports count for neither. Runs
alternate; medians are compared. Then token ids and masks are compared row by row. Writes benchmarks/results/.
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
from pathlib import Path
from typing import Any

from common import REPO, Quiet, machine, write_result

MAX_LENGTH = 512
TRL_VARIANTS = {"trl": None, "trl, 2 processes": 2}


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def run_llmkit(args: argparse.Namespace) -> dict[str, Any]:
    """Twice in one cache folder: the first run and the second."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401  imported in the histogram; imports are not what is measured
    from transformers import AutoTokenizer

    from llmkit.data.packing import best_fit
    from llmkit.data.prepare import prepare
    from llmkit.data.render import Renderer
    from llmkit.data.settings import DataSettings

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    settings = DataSettings(
        train=args.data,
        format="prompt_completion",
        columns={"prompt": "question", "completion": "answer"},
        max_length=MAX_LENGTH,
        on_too_long="drop",
        packing=True,
        cache_dir=str(args.cache / "tokens"),
    )
    seconds, used = [], []
    for _ in range(2):
        begin, cpu = time.perf_counter(), cpu_seconds()
        made = prepare(settings, Renderer(tokenizer), seed=0, output_dir=args.cache, progress=Quiet())
        bins = best_fit(made.train.lengths, MAX_LENGTH)
        seconds.append(time.perf_counter() - begin)
        used.append(cpu_seconds() - cpu)
    assert made.report["cache"]["hit"]
    if args.rows:
        keep = {
            made.train.row_id(i).rsplit(":", 1)[1]: [part.tolist() for part in made.train.row(i)]
            for i in range(len(made.train))
        }
        args.rows.write_text(json.dumps(keep), encoding="utf-8")
    return {
        "seconds": seconds[0],
        "cpu_seconds": used[0],
        "second_run": seconds[1],
        "tokens": made.train.tokens,
        "sequences": len(bins),
    }


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    """The real SFTTrainer on a tiny model, its preparation timed; twice over the same cache of ``datasets``."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset("json", data_files=args.data, split="train", cache_dir=str(args.cache))
    rows = rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=rows.column_names,
    )
    seconds, used = [], []
    original = SFTTrainer._prepare_dataset

    def timed(self: Any, *positional: Any, **named: Any) -> Any:
        begin, cpu = time.perf_counter(), cpu_seconds()
        prepared = original(self, *positional, **named)
        seconds.append(time.perf_counter() - begin)
        used.append(cpu_seconds() - cpu)
        return prepared

    SFTTrainer._prepare_dataset = timed
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    packing = not args.rows
    for _ in range(2):
        trainer = SFTTrainer(
            model=LlamaForCausalLM(config),
            args=SFTConfig(
                output_dir=str(args.cache / "out"), max_length=MAX_LENGTH, packing=packing, completion_only_loss=True,
                dataset_num_proc=args.processes or None, report_to="none", use_cpu=True, bf16=False,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
    data: Any = trainer.train_dataset
    if args.rows:
        keep = {str(n): [row["input_ids"], row["labels"]] for n, row in enumerate(data, 1)}
        args.rows.write_text(json.dumps(keep), encoding="utf-8")
    tokens = sum(map(len, data["input_ids"]))
    return {
        "seconds": seconds[0],
        "cpu_seconds": used[0],
        "second_run": seconds[1],
        "tokens": tokens,
        "sequences": len(data),
    }


def start(who: str, args: argparse.Namespace, rows: Path | None = None) -> dict[str, Any]:
    """One measurement in a fresh process and a fresh cache folder."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, __file__, "--worker", who.split(",")[0], "--cache", folder]
        argv += ["--model", args.model, "--data", args.data, "--processes", str(TRL_VARIANTS.get(who) or 0)]
        argv += ["--rows", str(rows)] if rows else []
        done = subprocess.run(
            argv, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
        )
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Token ids and masks of llmkit and TRL, row by row (TRL without packing, where rows stay apart)."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {who: Path(folder) / f"{who}.json" for who in ("llmkit", "trl")}
        for who, path in paths.items():
            start(who, args, path)
        ours, theirs = (json.loads(path.read_text(encoding="utf-8")) for path in paths.values())
    same_ids = same_mask = mask_but_for_end = 0
    for number, (ids, labels) in ours.items():
        other_ids, other_labels = theirs[number]
        same_ids += ids == other_ids
        same_mask += labels == other_labels
        last = max(n for n, label in enumerate(labels) if label != -100)
        mask_but_for_end += labels[: last + 1] == other_labels[: last + 1]
    return {
        "rows": len(ours),
        "rows_with_equal_ids": same_ids,
        "rows_with_equal_masks": same_mask,
        "rows_with_equal_masks_up_to_the_stop_token": mask_but_for_end,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=str(REPO / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--data", default=str(REPO.parent / "shared" / "data" / "gsm8k" / "train.jsonl"))
    parser.add_argument("--worker", choices=["llmkit", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(run_llmkit(args) if args.worker == "llmkit" else run_trl(args)))
        return
    packages = ("tokenizers", "transformers", "trl", "datasets", "pyarrow", "numpy")
    found: dict[str, Any] = {"machine": machine(*packages), "runs": {}}
    for number in range(args.rounds):
        for who in ("llmkit", *TRL_VARIANTS):
            measured = start(who, args)
            found["runs"].setdefault(who, []).append(measured)
            print(f"round {number + 1}  {who:18} {measured['seconds']:7.2f} s ({measured['cpu_seconds']:.2f} s of CPU), second run {measured['second_run']:.3f} s, "
                  f"{measured['tokens'] / measured['seconds']:,.0f} tokens/s")  # fmt: skip
    medians = {who: statistics.median(run["seconds"] for run in runs) for who, runs in found["runs"].items()}
    best = min(TRL_VARIANTS, key=lambda who: medians[who])
    found["median_seconds"] = medians
    found["median_second_run"] = {
        who: statistics.median(run["second_run"] for run in runs) for who, runs in found["runs"].items()
    }
    found["tokens_per_second"] = {who: found["runs"][who][0]["tokens"] / medians[who] for who in medians}
    found["times_faster_than_best_trl"] = medians[best] / medians["llmkit"]
    found["best_trl"] = best
    cpu = {who: statistics.median(run["cpu_seconds"] for run in runs) for who, runs in found["runs"].items()}
    found["median_cpu_seconds"] = cpu
    found["less_cpu_than_best_trl"] = min(cpu[who] for who in TRL_VARIANTS) / cpu["llmkit"]
    found["agreement"] = compare(args)
    print(f"llmkit {medians['llmkit']:.2f} s against {best} {medians[best]:.2f} s: "
          f"{found['times_faster_than_best_trl']:.1f} times as fast, {found['less_cpu_than_best_trl']:.1f} times less CPU; second run {found['median_second_run']['llmkit']:.3f} s")  # fmt: skip
    print(f"agreement: {found['agreement']}")
    write_result("data_prep", found)


if __name__ == "__main__":
    main()
