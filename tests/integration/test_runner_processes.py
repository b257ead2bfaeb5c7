"""The runner in processes of its own: signals, the lock, several ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOYS = Path(__file__).parent.parent / "toys"


def result_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return data


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: toy\noutput_dir: {tmp_path}/out\nsteps: 1000\npause: 0.05\ntracking: {{enabled: false}}\n"
    )
    command = [sys.executable, TOYS / "toy_cli.py", "toy", recipe]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(tmp_path / "out" / "seen-by-0", first)
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert f"Another llmkit process ({first.pid} on " in second.stderr
        first.kill()  # the kernel releases the lock
        first.wait()
        folder = tmp_path / "out" / "checkpoints" / "checkpoint-1000"
        folder.mkdir(parents=True)
        (folder / "step").write_text("1000")
        third = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert third.returncode == 0, third.stderr
        assert result_of(tmp_path / "out")["metrics"]["started_at"] == 1000
    finally:
        first.kill()
        first.communicate()


def test_sigterm_stops_with_a_checkpoint_and_the_next_start_goes_on(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = f"name: toy\noutput_dir: {tmp_path}/out\nsteps: 40\npause: 0.05\ntracking: {{enabled: false}}\n"
    recipe.write_text(text)
    command = [sys.executable, TOYS / "toy_cli.py", "toy", recipe]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        _wait_for(tmp_path / "out" / "seen-by-0", process)
        (tmp_path / "out" / "seen-by-0").unlink()
        time.sleep(0.2)
        process.send_signal(number)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == 138, stderr
        assert f"Stopped by {number.name}" in stderr
        assert result_of(tmp_path / "out")["status"] == "stopped"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "out")["metrics"]["started_at"] >= 3


def test_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: toy\noutput_dir: {tmp_path}/out\nsteps: 9\npause: 30\ntracking: {{enabled: false}}\n")
    process = subprocess.Popen(
        [sys.executable, TOYS / "toy_cli.py", "toy", recipe], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _wait_for(tmp_path / "out" / "seen-by-0", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 130, stderr
    assert time.monotonic() - begin < 10
    assert "Press Ctrl-C again" in stderr
    assert result_of(tmp_path / "out")["error"] == "interrupted"


def test_two_ranks_agree_and_only_the_first_writes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: toy\noutput_dir: {tmp_path}/out\ntracking: {{enabled: false}}\n")
    for expected in ("step 3/3", "nothing to do"):
        outcome = _two_ranks(recipe)
        assert [p[0] for p in outcome] == [0, 0], outcome
        assert expected in outcome[0][1]
        assert "step 3/3" not in outcome[1][1]
        assert "nothing to do" not in outcome[1][1]
        assert "run folder" in outcome[0][1]
        assert "run folder" not in outcome[1][1]
    assert (tmp_path / "out" / "seen-by-1").exists()
    recipe.write_text(recipe.read_text() + "steps: 7\n")
    outcome = _two_ranks(recipe)
    assert [p[0] for p in outcome] == [2, 2], outcome
    assert all("steps differs" in p[1] for p in outcome)


def _two_ranks(recipe: Path) -> list[tuple[int, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, TOYS / "toy_cli.py", "toy", recipe],
            env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for r in (0, 1)
    ]  # fmt: skip
    texts = [p.communicate(timeout=120)[1] for p in processes]
    return [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]


def _wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            raise AssertionError(f"{path} did not appear: {process.communicate()[1]}")
        time.sleep(0.02)
