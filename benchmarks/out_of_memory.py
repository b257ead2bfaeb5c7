"""Runs that are given too little memory: how they end, and whether the same command then goes on and ends right.

    python benchmarks/out_of_memory.py [--cases cgroup-1 cgroup-2 ulimit-1 ulimit-2] [--at "long steps" export] [--add]

A small Llama (16 million weights) is trained for 12 steps, the last six of them on rows that are much longer than the first.
A run without a limit is watched first: what the memory of its control group was while it loaded, in the short steps, in
the long ones, and in the export. Limits are then set below each of these, so that the run dies there; with ``ulimit -v``
they are a fixed ladder, because address space says little about memory. A run must end by itself (after 10 minutes it
counts as a hang) with exit code 5, or 1 with a message that says what killed it, and leave no process behind.

After that the same command runs without the limit: it must go on from the last complete checkpoint and end with the
weights of the run that was never limited, bit for bit. Needs root, for the control groups (v1 or v2). Writes
benchmarks/results/out_of_memory-<date>.json after every run, and ends with 1 when one ended otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from common import REPO, RESULTS, machine, write_result

HANG_S = 600.0
STEPS, LONG_FROM = 12, 7
ULIMITS_MB = {1: (1200, 2400, 3000), 2: (2700,)}
KINDS = ("cgroup-1", "cgroup-2", "ulimit-1", "ulimit-2")


@dataclass
class Seen:
    """A start of the command: how it ended, and the most memory its control group had in each phase, in MB."""

    code: int | str
    stderr: str
    seconds: float
    peaks: dict[str, int]

    @property
    def phase(self) -> str:
        return list(self.peaks)[-1] if self.peaks else "start"

    @property
    def message(self) -> list[str]:
        """The lines after the last one of the progress."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        known = ("step ", "train: ", "Processes: ", "Saving ", "Going on ", "Failed to load CPU", "tokenizing")
        last = max((i for i, line in enumerate(lines) if line.startswith(known)), default=-1)
        return lines[last + 1 :]


def phase_of(lines: list[str]) -> str:
    """What a run was doing after it had written these lines."""
    text = "\n".join(lines)
    steps = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]
    if "and opening it again" in text:
        return "export"
    if steps:
        return "long steps" if steps[-1] >= LONG_FROM - 1 else "short steps"
    return "model and first step" if "train: " in text else "load"


@contextmanager
def control_group(limit_mb: int | None) -> Iterator[Path]:
    """A control group of its own, with a limit or without."""
    v1 = Path("/sys/fs/cgroup/memory")
    top = v1 if (v1 / "memory.limit_in_bytes").exists() else Path("/sys/fs/cgroup")
    group = top / f"llmkit-oom-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        if limit_mb is not None:
            for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max", "memory.swap.max"):
                if (group / name).exists():
                    (group / name).write_text("0" if name == "memory.swap.max" else str(limit_mb * 2**20))
        yield group
    finally:
        for _ in range(100):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def used_mb(group: Path) -> int:
    """Memory of the processes in a control group without the page cache, which the kernel gives up first."""
    stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
    return int(stat.get("total_rss") or stat.get("anon") or 0) // 2**20


def start(folder: Path, processes: int, *, cgroup_mb: int | None = None, ulimit_mb: int | None = None) -> Seen:
    """Run the command of ``folder`` to its end."""
    command = [sys.executable, "-m", "llmkit", "sft", "recipe.yaml", f"launch.processes={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    lines: list[str] = []
    peaks: dict[str, int] = {}
    begin = time.monotonic()
    with control_group(cgroup_mb) as group:
        shell = f'echo $$ > {group}/cgroup.procs; {f"ulimit -v {ulimit_mb * 1024};" if ulimit_mb else ""} exec "$@"'
        process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command], cwd=folder, env=env, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        while process.poll() is None and time.monotonic() - begin < HANG_S:
            now = phase_of(lines)
            peaks[now] = max(peaks.get(now, 0), used_mb(group))
            time.sleep(0.02)
        hangs = process.poll() is None
        if hangs:
            process.kill()
        process.wait()
        reader.join(10)
        time.sleep(0.5)
        left = (group / "cgroup.procs").read_text().split()
        for pid in left:
            os.kill(int(pid), 9)
    code: int | str = "hang" if hangs else f"{len(left)} processes left" if left else process.returncode
    return Seen(code, "".join(lines), round(time.monotonic() - begin, 1), peaks)


def write_recipe(folder: Path, model: Path, rows: Path) -> None:
    """A recipe whose run stays in ``folder``."""
    folder.mkdir(parents=True)
    content = {
        "name": "oom", "output_dir": "out", "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 2048, "shuffle": False, "cache_dir": "cache"},
        "train": {
            "max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "logging_steps": 1,
            "save_steps": 2, "sample_prompts": 0, "micro_batch_tokens": 0,
        },
        "launch": {"timeout_minutes": 2.0}, "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(content, indent=1))


def write_rows(path: Path, processes: int) -> Path:
    """A row for each process and step: short ones, then long ones."""
    short = {"prompt": "What is 1 + 1?", "completion": "It is 2."}
    long = {"prompt": "Count.", "completion": " ".join(map(str, range(500)))}
    rows = [short if step < LONG_FROM else long for step in range(1, STEPS + 1) for _ in range(processes)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(folder: Path) -> Path:
    """A random Llama with the tokenizer of the demo model."""
    code = (
        "import sys, torch\n"
        "from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM\n"
        "words = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "torch.manual_seed(0)\n"
        "config = LlamaConfig(vocab_size=len(words), hidden_size=256, intermediate_size=768, num_hidden_layers=4,\n"
        "    num_attention_heads=4, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,\n"
        "    bos_token_id=None, tie_word_embeddings=True)\n"
        "LlamaForCausalLM(config).save_pretrained(sys.argv[2])\n"
        "words.save_pretrained(sys.argv[2])\n"
    )
    demo = REPO / "models" / "smollm2-135m-instruct"
    subprocess.run([sys.executable, "-c", code, str(demo), str(folder)], check=True, capture_output=True)
    return folder


def complete_checkpoints(out: Path) -> list[int]:
    """Steps of the checkpoints whose files are all there."""
    from llmkit.training.checkpoints import newest_first, problem

    found = newest_first(out / "checkpoints")
    return sorted(int(path.name.split("-")[1]) for path in found if problem(path) is None)


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()


def limits_of(reference: Seen) -> dict[str, int]:
    """Below the peak of each phase that needs more than all before it, and far below the first. By phase, in MB."""
    heights, highest = {}, 0
    for phase, peak in reference.peaks.items():
        if peak > highest * 1.04:
            heights[phase] = int(max(highest * 1.02, peak * 0.93))
            highest = peak
    return {"imports": min(heights.values()) // 2} | heights


def case(folder: Path, processes: int, reference: Path, **limit: int) -> dict[str, Any]:
    """One limited run, and the same command without the limit after it."""
    limited = start(folder, processes, **limit)
    out = folder / "out"
    checkpoints = complete_checkpoints(out)
    written = json.loads((out / "result.json").read_text()) if (out / "result.json").exists() else {}
    found: dict[str, Any] = {
        "processes": processes, **limit, "exit_code": limited.code, "died_in": limited.phase,
        "seconds": limited.seconds, "message": limited.message[:1] or [""], "rest_of_message": limited.message[1:8],
        "result_json": written.get("exit_code"), "last_checkpoint": checkpoints[-1] if checkpoints else None,
    }  # fmt: skip
    found["message"] = found["message"][0]
    if limited.code == 0:
        return found | {"right": same_weights(out, reference), "went_on": None}
    after = start(folder, processes)
    going = [line for line in after.stderr.splitlines() if line.startswith("Going on")]
    found["went_on"] = going[0].removeprefix("Going on ").replace(str(folder), "") if going else "from the start"
    found["then_exit_code"] = after.code
    found["right"] = (
        limited.code in (1, 5) and bool(limited.message) and after.code == 0 and same_weights(out, reference)
    )
    return found


def show(row: dict[str, Any]) -> None:
    limit = row.get("cgroup_mb") or row.get("ulimit_mb")
    print(
        f"{row['processes']} process(es), {limit} MB: {row['exit_code']} in {row['died_in']} after {row['seconds']} s; "
        f"checkpoint {row['last_checkpoint']}; then {row['went_on']}; right: {row['right']}\n    {row['message']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--at", nargs="+", help="only these phases of the control group's limits")
    parser.add_argument("--add", action="store_true", help="to what today's result holds")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine("torch", "transformers"), "phases_mb": {}, "runs": []}
    old = RESULTS / f"out_of_memory-{date.today().isoformat()}.json"
    if options.add and old.exists():
        result = json.loads(old.read_text())
    rows: list[dict[str, Any]] = result["runs"]
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        shutil.copytree(REPO / "llmkit", top / "code" / "llmkit")  # whoever edits the checkout meanwhile
        os.environ["PYTHONPATH"] = str(top / "code")
        model = make_model(top / "model")
        for processes in sorted({int(name[-1]) for name in options.cases}):
            data = write_rows(top / f"rows-{processes}.jsonl", processes)
            write_recipe(top / f"reference-{processes}", model, data)
            reference = start(top / f"reference-{processes}", processes)
            if reference.code != 0:
                raise RuntimeError(reference.stderr)
            print(f"{processes} process(es), no limit: {reference.peaks} MB, {reference.seconds} s", flush=True)
            result["phases_mb"][f"{processes} process(es)"] = reference.peaks
            plans: list[dict[str, int]] = []
            if f"cgroup-{processes}" in options.cases:
                heights = limits_of(reference)
                plans += [{"cgroup_mb": heights[phase]} for phase in options.at or heights if phase in heights]
            if f"ulimit-{processes}" in options.cases:
                plans += [{"ulimit_mb": limit} for limit in ULIMITS_MB[processes]]
            for number, plan in enumerate(plans):
                folder = top / f"{processes}-{number}"
                write_recipe(folder, model, data)
                rows.append(case(folder, processes, top / f"reference-{processes}" / "out", **plan))
                show(rows[-1])
                write_result("out_of_memory", result)
                shutil.rmtree(folder)
    wrong = [row for row in rows if not row["right"]]
    print(f"{len(rows)} runs, {len(wrong)} of them not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
