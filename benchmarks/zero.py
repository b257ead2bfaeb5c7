"""Every way to divide a model: ZeRO 1, 2 and 3, plain and offloaded, and FSDP2, with one and two processes, full and LoRA.

    python benchmarks/zero.py [--only NAME ...] [--steps 30] [--model FOLDER] [--data FILE]

A row is a real run of the demo model on Banking77 in processes of its own: 30 steps of 2 questions (float32, all
processes together take the same rows in a step, so every row of the table should end at the same loss; short questions,
because dividing a model costs by its weights, not by its tokens), a checkpoint at step 25, the exported model opened again in a fresh process by the run itself, then the last checkpoint and the model are thrown away and the
same command goes on from step 25: `resumed` is its loss at step 30. Rows are written as they come; those that the file of
today has already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from common import REPO, RESULTS, machine

PRESETS = ("none", "zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme", "fsdp")
ROWS = [(preset, kind, n) for n in (1, 2) for kind in ("full", "lora") for preset in PRESETS]
SAVED_AT = 5
"""Steps before the end at which the checkpoint is written."""


def recipe(arguments: argparse.Namespace, preset: str, kind: str, processes: int, out: Path) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": f"{preset}-{kind}-{processes}", "output_dir": str(out), "seed": 0,
        "model": {"name_or_path": str(arguments.model), "dtype": "float32"},
        "data": {
            "train": str(arguments.data), "format": "prompt_completion",
            "columns": {"prompt": "text", "completion": "category"}, "max_length": 64, "on_too_long": "drop",
            "cache_dir": str(arguments.cache), "shuffle": False,
        },
        "train": {
            "max_steps": arguments.steps, "per_device_train_batch_size": 2 // processes, "logging_steps": 1,
            "save_steps": arguments.steps - SAVED_AT, "sample_prompts": 0, "save_total_limit": None,
            "learning_rate": 2e-5 if kind == "full" else 2e-4,
        },
        "tracking": {"enabled": False},
    }  # fmt: skip
    if preset == "fsdp":
        made["fsdp"] = {}
    elif preset != "none":
        made["deepspeed"] = preset
    return made


def worker(folder: Path) -> None:
    """One process of a row: train, forget the end, go on from the checkpoint; each writes what it needed."""
    import llmkit

    rank = int(os.environ.get("RANK", "0"))
    given = json.loads((folder / "row.json").read_text())
    stage, made, out = given["stage"], given["recipe"], Path(given["recipe"]["output_dir"])
    begun = time.perf_counter()
    result = getattr(llmkit, stage)(made)
    found = {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": time.perf_counter() - begun,
    }
    if rank == 0:
        found |= {"metrics": dict(result.metrics), "losses": losses(out)}
        last = out / "checkpoints" / f"checkpoint-{given['steps']}"
        found["checkpoint_bytes"] = sum(p.stat().st_size for p in last.rglob("*") if p.is_file())
        shutil.rmtree(last)
        (out / "result.json").unlink()
        (out / "log.jsonl").rename(out / "log-first.jsonl")
        for name in ("model", "adapter"):
            shutil.rmtree(out / name, ignore_errors=True)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # the processes meet a second time
    wait_for_all(folder, rank, given["processes"])
    getattr(llmkit, stage)(made)
    if rank == 0:
        found["resumed_losses"] = losses(out)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def wait_for_all(folder: Path, rank: int, count: int) -> None:
    (folder / f"ready-{rank}").touch()
    while len(list(folder.glob("ready-*"))) < count:
        time.sleep(0.05)


def logged(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in (line.get("metrics") or {}) and line.get("step")]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["metrics"]["loss"] for line in logged(out)}


def run_row(arguments: argparse.Namespace, preset: str, kind: str, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="llmkit-zero-", dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        given = {
            "stage": "sft" if kind == "full" else "lora", "steps": arguments.steps, "processes": processes,
            "recipe": recipe(arguments, preset, kind, processes, folder / "out"),
        }  # fmt: skip
        (folder / "row.json").write_text(json.dumps(given))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes == 1:
            command = [sys.executable]
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(REPO)}
        begun = time.perf_counter()
        done = subprocess.run(
            [*command, str(Path(__file__).resolve()), "--worker", str(folder)],
            env=environment, capture_output=True, text=True, timeout=900, cwd=folder, check=False,
        )  # fmt: skip
        row: dict[str, Any] = {"setting": preset, "kind": kind, "processes": processes}
        if done.returncode:
            return row | {"failed": done.returncode, "said": done.stderr.strip().splitlines()[-12:]}
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        return row | figures(ranks, arguments.steps) | {"row_seconds": round(time.perf_counter() - begun, 1)}


def figures(ranks: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    first = ranks[0]
    final, again = first["losses"][str(steps)], first["resumed_losses"][str(steps)]
    return {
        "final_loss": round(final, 5),
        "resumed_loss": round(again, 5),
        "resumed_at": min(int(step) for step in first["resumed_losses"]) - 1,
        "resumed_equal": abs(final - again) <= 1e-5 * abs(final),
        "peak_gb_by_rank": [round(rank["peak_bytes"] / 1e9, 2) for rank in ranks],
        "seconds_per_step": round(first["metrics"]["train_seconds"] / steps, 3),
        "checkpoint_mb": round(first["checkpoint_bytes"] / 1e6, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "reopened": True,  # the run would have failed
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| setting | kind | processes | final loss | resumed from 25 | peak GB by rank | s a step | checkpoint MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(
                f"| {row['setting']} | {row['kind']} | {row['processes']} | failed: {row['said'][-1]} | | | | |"
            )
            continue
        again = "the same" if row["resumed_equal"] else f"{row['resumed_loss']:.5f}"
        peak = ", ".join(f"{value:.2f}" for value in row["peak_gb_by_rank"])
        lines.append(
            f"| {row['setting']} | {row['kind']} | {row['processes']} | {row['final_loss']:.5f} | {again} | {peak} |"
            f" {row['seconds_per_step']:.2f} | {row['checkpoint_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--only", nargs="*", default=None, help="e.g. zero3-full-2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", type=Path, default=REPO / "models" / "smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=REPO.parent / "shared" / "data" / "banking77" / "train.csv")
    parser.add_argument("--scratch", default=None, help="folder for the runs; the system's when left out")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker)
        return
    path = RESULTS / f"zero-{date.today().isoformat()}.json"
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    done = {(row["setting"], row["kind"], row["processes"]) for row in result["rows"] if "failed" not in row}
    with tempfile.TemporaryDirectory(prefix="llmkit-zero-cache-") as cache:
        arguments.cache = cache
        for row in ROWS:
            name = "-".join(map(str, row))
            if row in done or (arguments.only is not None and name not in arguments.only):
                continue
            made = run_row(arguments, *row)
            kept = [r for r in result["rows"] if (r["setting"], r["kind"], r["processes"]) != row]
            order = {key: i for i, key in enumerate(ROWS)}
            rows = sorted([*kept, made], key=lambda r: order[(r["setting"], r["kind"], r["processes"])])
            result = {
                "machine": machine("torch", "transformers", "deepspeed", "peft"), "steps": arguments.steps,
                "command": "python benchmarks/zero.py", "rows": rows,
            }  # fmt: skip
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".md").write_text(table(rows), encoding="utf-8")
            print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
