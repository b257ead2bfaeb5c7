"""How long ``llmkit --help`` takes, beside the bare interpreter, typer alone, and ``trl --help``.

    python benchmarks/startup.py [--repeats 15]

The commands take turns, so that a busy moment of the machine hits all of them; the median of each is reported.
Writes benchmarks/results/startup-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import REPO, machine, write_result

BIN = Path(sys.executable).parent
GOAL = 2.5


def commands() -> dict[str, list[str]]:
    python = sys.executable
    found = {
        "python": [python, "-c", "pass"],
        "typer": [python, "-c", "import typer"],
        "llmkit --help": [python, "-m", "llmkit", "--help"],
        "llmkit sft --help": [python, "-m", "llmkit", "sft", "--help"],
        "llmkit sft --dry-run": [
            python,
            "-m",
            "llmkit",
            "sft",
            str(REPO / "recipes/sft/quickstart.yaml"),
            "--dry-run",
        ],
    }
    if (BIN / "trl").exists():
        found["trl --help"] = [str(BIN / "trl"), "--help"]
    return found


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, cwd=REPO)
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = max(parser.parse_args().repeats, 10)
    todo = commands()
    taken: dict[str, list[float]] = {name: [] for name in todo}
    for round_number in range(repeats + 1):
        for name, command in todo.items():
            once = seconds(command)
            if round_number > 0:  # the first round fills the file cache
                taken[name].append(once)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    help_time = medians["llmkit --help"]
    ratios = {f"llmkit --help / {name}": round(help_time / value, 2) for name, value in medians.items()}
    reached = help_time <= GOAL * medians["typer"]
    report = {
        "machine": machine("typer", "trl"),
        "repeats": repeats,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "fastest_seconds": {name: round(min(values), 4) for name, values in taken.items()},
        "ratios": ratios,
        "goal": f"llmkit --help <= {GOAL} x (interpreter and typer)",
        "reached": reached,
    }
    write_result("startup", report)
    print(json.dumps(report, indent=2))
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
