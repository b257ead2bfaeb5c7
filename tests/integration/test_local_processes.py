"""Several processes of one run on this machine: what the user sees, how they end, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from training_runs import recipe as sft_recipe

TOYS = Path(__file__).parent.parent / "toys"
RING = [sys.executable, str(TOYS / "toy_cli.py"), "ring", "recipe.yaml"]


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    found = Ring(tmp_path)
    yield found
    found.nobody_is_left()


class Ring:
    """Runs of the ring stage in two processes in ``folder/out``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        content = {"name": "ring", "output_dir": "out", "launch": {"processes": 2}, "tracking": {"enabled": False}}
        (folder / "recipe.yaml").write_text(json.dumps(content))
        self.env = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
        self.env.pop("OMP_NUM_THREADS", None)

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RING, *args], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120, check=False
        )

    def start(self, *args: str, command: list[str] | None = None) -> subprocess.Popen[str]:
        """Returns when both processes have begun."""
        process = subprocess.Popen(
            command or [*RING, *args], cwd=self.folder, env=self.env, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        limit = time.monotonic() + 90
        while not all((self.out / f"pid-{rank}").exists() for rank in (0, 1)):
            if process.poll() is not None or time.monotonic() > limit:
                process.kill()
                raise AssertionError(process.communicate()[1])
            time.sleep(0.02)
        return process

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.out.glob("pid-*") if path.read_text()]

    def result(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return data

    def log(self, rank: int) -> str:
        return (self.out / "logs" / f"rank-{rank}.log").read_text()

    def nobody_is_left(self) -> None:
        limit = time.monotonic() + 5
        while any(map(psutil.pid_exists, self.pids())) and time.monotonic() < limit:
            time.sleep(0.05)
        assert not [pid for pid in self.pids() if psutil.pid_exists(pid)]


def test_two_processes_are_one_run(ring: Ring) -> None:
    done = ring.run("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ring.result()
    assert ring.result()["status"] == "done"
    assert "Processes: 2 on this machine, " in done.stderr
    assert done.stderr.count("step 4/4") == done.stderr.count("ring ring: done") == 1
    assert "rank 0 writes to stderr" in done.stderr
    assert "rank 0 prints" in done.stderr
    assert "rank 1" not in done.stderr
    assert f"with {max(1, len(os.sched_getaffinity(0)) // 2)} threads" in ring.log(1)
    assert "rank 1 writes to stderr" in ring.log(1)
    assert "step 4/4" in ring.log(0)
    again = ring.run()
    assert again.returncode == 0
    assert "nothing to do" in again.stderr


@pytest.mark.parametrize(
    ("fate", "code", "said"),
    [
        ("1:3:KILL", 1, "Rank 1 of 2 was killed by SIGKILL (signal 9): "),
        ("0:3:KILL", 1, "Rank 0 of 2 was killed by SIGKILL (signal 9): "),
        ("1:3:SEGV", 1, "Rank 1 of 2 was killed by SIGSEGV (signal 11): it crashed in native code"),
        ("1:3:exit", 1, "Rank 1 of 2 ended with exit code 7 without saying why"),
        ("1:3:data", 3, "row 17 is broken\n(rank 1; its output: "),
        ("1:3:raise", 1, "a bug in llmkit: ValueError: nobody foresaw this"),
        ("0:3:raise", 1, "a bug in llmkit: ValueError: nobody foresaw this"),
    ],
)
def test_a_process_that_dies_takes_the_run_down_and_is_named(ring: Ring, fate: str, code: int, said: str) -> None:
    done = ring.run(f"fate={fate}")
    result = ring.result()
    assert (done.returncode, result["exit_code"], result["status"]) == (code, code, "failed"), done.stderr
    assert said in done.stderr
    assert said in result["error"]
    assert done.stderr.count(said) == 1
    if fate.endswith(("KILL", "SEGV", "exit")):
        assert f"rank {fate[0]} meets its fate" in result["error"]  # its last lines
    assert (ring.out / "checkpoints" / "checkpoint-2").is_dir()


def test_a_process_that_hangs_ends_the_run_in_time(ring: Ring) -> None:
    done = ring.run("fate=1:3:STOP", "launch.timeout_minutes=0.05")
    assert done.returncode == 1, done.stderr
    for text in (done.stderr, ring.result()["error"]):
        assert "did not answer in time" in text
        assert "launch.timeout_minutes" in text
        assert "Rank 1 was ended: it is stopped (SIGSTOP)." in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_all_with_a_checkpoint(ring: Ring, number: signal.Signals) -> None:
    process = ring.start("steps=1000", "pause=0.05")
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 138, stderr
    assert stderr.count(f"Stopped by {number.name} with a checkpoint") == 1
    assert ring.result()["status"] == "stopped"
    last = max(int(p.name.split("-")[1]) for p in (ring.out / "checkpoints").iterdir())
    assert 0 < last < 1000


def test_a_signal_is_not_lost_while_the_processes_start(ring: Ring) -> None:
    process = subprocess.Popen(
        [*RING, "steps=1000", "pause=0.05"], cwd=ring.folder, env=ring.env, stderr=subprocess.PIPE, text=True
    )
    while not (ring.out / "logs" / "rank-1.log").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 138, stderr
    assert "Stopped by SIGUSR1" in ring.result()["error"]


def test_a_second_ctrl_c_leaves_at_once(ring: Ring) -> None:
    process = ring.start("pause=50")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130, stderr
    assert stderr.count("Press Ctrl-C again") == 1
    assert ring.result()["error"] == "interrupted"


def test_kill_9_of_the_launcher_leaves_nobody_and_the_folder_free(ring: Ring) -> None:
    process = ring.start("steps=1000", "pause=0.05")
    process.kill()
    process.communicate()
    ring.nobody_is_left()
    (ring.out / "checkpoints" / "checkpoint-999").mkdir(parents=True)
    done = ring.run("steps=1000", "pause=0.05")
    assert done.returncode == 0, done.stderr
    assert ring.result()["metrics"]["started_at"] == 999


def test_under_another_launcher_the_dead_process_is_named(ring: Ring) -> None:
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *RING[1:],
        "fate=1:3:KILL",
    ]  # fmt: skip
    done = subprocess.run(torchrun, cwd=ring.folder, env=ring.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    result = ring.result()
    assert result["exit_code"] == 1
    assert "Another process of this run is gone" in result["error"]
    assert "Here rank 1 (process " in result["error"]
    assert ") is gone" in result["error"]


def test_from_python(ring: Ring) -> None:
    code = (
        "import sys; sys.argv = ['x']\n"
        "import llmkit\n"
        "from llmkit.errors import ProcessLostError\n"
        "from pathlib import Path\n"
        "import json\n"
        "what = json.loads(Path('sft.json').read_text())\n"
        "try:\n    llmkit.sft(what)\n"
        "except llmkit.errors.LlmkitError as error:\n    print(type(error).__name__, error.exit_code, error)\n"
    )
    what = {
        "name": "a", "model": {"name_or_path": "no/model"}, "data": {"train": "rows.jsonl"},
        "launch": {"processes": 2}, "tracking": {"enabled": False},
    }  # fmt: skip
    (ring.folder / "sft.json").write_text(json.dumps(what))
    (ring.folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    done = subprocess.run([sys.executable, "-c", code], cwd=ring.folder, env=ring.env, capture_output=True, text=True)
    assert done.stdout.startswith("MissingError 6 "), done.stdout + done.stderr


@pytest.mark.slow
def test_training_goes_on_after_a_process_was_killed(tiny_llama: Path, tmp_path: Path) -> None:
    what = sft_recipe(tmp_path, tiny_llama, max_steps=8, save_steps=2) | {"launch": {"processes": 2}}
    (tmp_path / "sft.json").write_text(json.dumps(what))
    command = [sys.executable, "-m", "llmkit", "sft", "sft.json"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    out = tmp_path / "out"
    limit = time.monotonic() + 200
    while not (out / "checkpoints" / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[1]
        time.sleep(0.002)
    psutil.Process(process.pid).children()[1].kill()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1, stderr
    assert "Rank 1 of 2 was killed by SIGKILL" in json.loads((out / "result.json").read_text())["error"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Going on from ") == 1
    assert json.loads((out / "result.json").read_text())["metrics"]["steps"] == 8


@pytest.mark.slow
def test_a_stream_reports_the_rows_of_all_ranks(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": "" if i % 6 == 0 else str(i)} for i in range(24)]
    (tmp_path / "stream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "stream.jsonl"), "streaming": True, "shuffle": False, "on_bad_row": "drop"}
    what = sft_recipe(tmp_path, tiny_llama, data=data, max_steps=2, per_device_train_batch_size=2)
    (tmp_path / "sft.json").write_text(json.dumps(what | {"launch": {"processes": 2}}))
    command = [sys.executable, "-m", "llmkit", "sft", "sft.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    (source,) = json.loads((tmp_path / "out" / "data_report.json").read_text())["sources"]
    assert (source["rows_read"], source["rows_used"], source["rows_bad"]) == (24, 20, 4)
    assert "of 24 rows read, 4 were left out" in done.stderr
