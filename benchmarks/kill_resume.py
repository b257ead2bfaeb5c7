"""``kill -9`` at random moments, then the same command: the weights of a run that was never killed, bit for bit.

    python benchmarks/kill_resume.py [--kills 24] [--seed 0] [--demo-kills 0]

A round starts ``llmkit sft`` in an empty folder, kills it (the whole process group, SIGKILL) at a moment drawn by seed,
starts the same command again, and so on; the last start is left alone. Moments are found by watching the run's folder
and its lines: while Python loads, in data preparation, in a step, while a checkpoint is written, while an old one is
removed, while the model is saved and reopened. What was really hit is read from the folder afterwards and reported.

Compared with a run that nobody touched: every tensor of the published model, every tensor of the last checkpoint's
optimizer, the random state, and the losses of all steps. ``--demo-kills`` does the same with SmolLM2-135M-Instruct, where
a save takes seconds. Writes benchmarks/results/kill_resume-<date>.json and ends with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIRST = ("imports", "data preparation")
LATER = ("step", "save", "step", "removal", "save", "export")
GIVE_UP_S = 300.0


@dataclass
class Kill:
    """``wanted`` is the moment that was waited for, ``hit`` what the folder says was going on."""

    wanted: str
    hit: str
    checkpoint: str
    seconds: float


@dataclass
class Round:
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What is run; ``steps`` in all, a checkpoint every ``save_steps``."""

    model: Path
    rows: Path
    steps: int = 40
    save_steps: int = 4
    dtype: str = "float32"
    batch: int = 4

    def recipe(self, folder: Path) -> Path:
        """``folder/recipe.yaml`` with everything that the run writes inside of ``folder``. JSON is YAML, too."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "name": "kill-resume", "output_dir": str(folder / "out"), "seed": 1,
            "model": {"name_or_path": str(self.model), "dtype": self.dtype},
            "data": {"train": str(self.rows), "max_length": 128, "packing": True, "cache_dir": str(folder / "cache")},
            "train": {
                "max_steps": self.steps, "per_device_train_batch_size": self.batch, "learning_rate": 1e-3,
                "logging_steps": 1, "save_steps": self.save_steps, "save_total_limit": 2, "sample_prompts": 0,
                "neftune_noise_alpha": 5.0,
            },
            "tracking": {"enabled": False},
        }  # fmt: skip
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return path


class Run:
    """One start of the command, watched."""

    def __init__(self, recipe: Path) -> None:
        self.folder = recipe.parent
        self.out = self.folder / "out"
        self.started = time.monotonic()
        self.lines: list[str] = []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmkit", "sft", str(recipe)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True, cwd=self.folder, env=environment, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    @property
    def step(self) -> int:
        """The last step that was logged."""
        numbers = [line.split()[1].split("/")[0] for line in self.lines if line.startswith("step ")]
        return int(numbers[-1]) if numbers else 0

    def has(self, pattern: str) -> bool:
        return any(self.folder.glob(pattern))

    def until(self, reached: Callable[[Run], bool]) -> bool:
        """False when the process ended first."""
        while self.process.poll() is None:
            if reached(self):
                return True
            if time.monotonic() - self.started > GIVE_UP_S:
                self.kill()
                raise TimeoutError("".join(self.lines)[-3000:])
            time.sleep(0.0005)
        return False

    def kill(self) -> None:
        """SIGKILL to the process and all its children."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        code = self.process.wait()
        self._reader.join(10)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code

    def landed(self) -> str:
        """What was going on, by what is on the disk."""
        out = self.out
        if not (out / "recipe.yaml").exists() or not self.lines:
            return "while Python was loading"
        if not (out / "data_report.json").exists():
            return "in data preparation" if self.has("cache/*") else "before data preparation"
        for mark, what in (
            (".partial", "while a checkpoint was written"),
            (".removed", "while a checkpoint was removed"),
        ):
            found = sorted(out.glob(f"checkpoints/.checkpoint-*{mark}"))
            if found:
                return f"{what} ({sum(1 for p in found[0].rglob('*') if p.is_file())} files in it)"
        if self.has("out/model.unchecked*") or self.has("out/.model.unchecked*") or (out / "model").exists():
            return "while the model was published"
        return f"after step {self.step}" if self.step else "while the model was loaded"


def moment(wanted: str, draw: random.Random, setting: Setting, begin: int) -> tuple[Callable[[Run], bool], float]:
    """When it is reached, and the most seconds that may pass after it."""
    if wanted == "imports":
        return (lambda _: True), 6.0
    if wanted == "data preparation":
        return (lambda run: run.has("cache/*")), 0.5
    if wanted == "step":
        step = draw.randint(begin + 1, max(begin + 1, setting.steps - 1))
        return (lambda run: run.step >= step), 0.1
    if wanted == "save":
        step = draw.randint(begin, max(begin, setting.steps - setting.save_steps))
        return (lambda run: run.step >= step and run.has("out/checkpoints/.checkpoint-*.partial")), 0.05
    if wanted == "removal":
        return (lambda run: run.has("out/checkpoints/.checkpoint-*.removed")), 0.002
    return (lambda run: run.has("out/model.unchecked*") or run.has("out/.model.unchecked*")), 2.0


def newest(out: Path) -> Path | None:
    """The newest checkpoint by number."""
    found = list(out.glob("checkpoints/checkpoint-*"))
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def play(setting: Setting, folder: Path, wanted: list[str], draw: random.Random) -> Round:
    """Kill at each of the moments in turn, then let it finish. Raises RuntimeError when the last start fails."""
    recipe = setting.recipe(folder)
    done = Round()
    for name in wanted:
        run = Run(recipe)
        done.starts += 1
        last = newest(run.out)
        reached, spread = moment(name, draw, setting, int(last.name.split("-")[1]) if last else 0)
        if not run.until(reached):
            if run.wait() != 0:
                raise RuntimeError(f"it ended with {run.process.returncode}:\n{''.join(run.lines)[-3000:]}")
            break  # it was done before that moment came
        time.sleep(draw.uniform(0, spread))
        if run.process.poll() is not None:
            break
        run.kill()
        last = newest(run.out)
        kill = Kill(name, run.landed(), last.name if last else "none", round(time.monotonic() - run.started, 2))
        done.kills.append(kill)
        print(f"  killed {kill.hit}; newest checkpoint: {kill.checkpoint}", flush=True)
    run = Run(recipe)
    done.starts += 1
    if run.wait() != 0:
        raise RuntimeError(f"it ended with {run.process.returncode}:\n{''.join(run.lines)[-3000:]}")
    return done


def compare(found: Path, reference: Path) -> tuple[int, list[str]]:
    """Tensors compared, and a line for each that differs."""
    import torch
    from safetensors.torch import load_file

    def state(out: Path) -> dict[str, Any]:
        last = newest(out)
        assert last is not None
        tensors: dict[str, Any] = {f"model.{k}": v for k, v in load_file(out / "model" / "model.safetensors").items()}
        tensors |= {f"checkpoint.{k}": v for k, v in load_file(last / "model.safetensors").items()}
        optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
        for number, values in optimizer.items():
            tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors["random"] = torch.load(last / "rng_state.pth", weights_only=False)["cpu"]
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        tensors["losses"] = torch.tensor([[entry["step"], entry["loss"]] for entry in history if "loss" in entry])
        tensors["last step"] = torch.tensor(int(last.name.split("-")[1]))
        return tensors

    a, b = state(found), state(reference)
    wrong = [f"{name} is on one side only" for name in sorted(a.keys() ^ b.keys())]
    wrong += [f"{name} differs" for name in sorted(a.keys() & b.keys()) if not torch.equal(a[name], b[name])]
    return len(a), wrong


def rounds(setting: Setting, folder: Path, kills: int, seed: int) -> list[Round]:
    """Rounds of a handful of kills each until there were ``kills``; each compared with a run that was left alone."""
    draw = random.Random(seed)
    print("reference", flush=True)
    play(setting, folder / "reference", [], draw)
    done: list[Round] = []
    later = list(LATER)
    while (left := kills - sum(len(r.kills) for r in done)) > 0:
        number = len(done)
        print(f"round {number + 1}, {left} kills to go", flush=True)
        draw.shuffle(later)
        order = sorted(later[:4], key=lambda name: name == "export")
        wanted = [FIRST[number % 2], *order][:left]
        one = play(setting, folder / str(number), wanted, draw)
        one.tensors, one.differences = compare(folder / str(number) / "out", folder / "reference" / "out")
        print(f"  {one.tensors} tensors compared, {len(one.differences)} differ", flush=True)
        done.append(one)
    return done


def tiny(folder: Path, tokenizer: Path) -> Path:
    """A random Llama of 2 layers with the tokenizer of the demo model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    """Sums as questions and answers."""
    rows = [
        {"prompt": f"What is {i} + {i * 7 % 100}?", "completion": f"It is {i + i * 7 % 100}."} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> int:
    from common import REPO, machine, write_result

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--demo-kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    demo = REPO / "models" / "smollm2-135m-instruct"
    begin = time.monotonic()
    result: dict[str, Any] = {"machine": machine("torch", "transformers"), "seed": options.seed}
    differences = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # A copy of the package: it must not change between two starts, whoever edits the checkout meanwhile.
        shutil.copytree(REPO / "llmkit", folder / "code" / "llmkit")
        os.environ["PYTHONPATH"] = str(folder / "code")
        settings = {
            "tiny": (Setting(tiny(folder / "model", demo), write_rows(folder / "rows.jsonl", 6000)), options.kills),
            "smollm2-135m": (
                Setting(demo, write_rows(folder / "few.jsonl", 400), 6, 2, "bfloat16", 2), options.demo_kills,
            ),
        }  # fmt: skip
        for name, (setting, kills) in settings.items():
            if not kills:
                continue
            done = rounds(setting, folder / name, kills, options.seed)
            differences += sum(len(one.differences) for one in done)
            every = [kill for one in done for kill in one.kills]
            result[name] = {
                "kills": len(every),
                "starts": sum(one.starts for one in done),
                "tensors_compared": sum(one.tensors for one in done),
                "differences": sum(len(one.differences) for one in done),
                "landed": dict(Counter(kill.hit.split(" (")[0] for kill in every).most_common()),
                "rounds": [asdict(one) for one in done],
            }
    result["seconds"] = round(time.monotonic() - begin)
    write_result("kill_resume", result)
    print("no tensor differs" if not differences else f"{differences} tensors differ")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
