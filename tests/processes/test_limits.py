"""Devices, cores and memory of this machine, as far as a run may use them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.processes import limits


def test_without_a_device_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_device_files", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert limits.visible_devices() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert limits.visible_devices() == 0


def test_what_the_user_lets_be_seen_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_device_files", lambda: 8)
    monkeypatch.setattr(limits, "_ask_torch", lambda: 8 if "," not in os.environ.get("CUDA_VISIBLE_DEVICES", "") else 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for value, devices in ((None, 8), ("3", 1), ("GPU-8932f937", 1), ("", 0), ("-1", 0), ("0,1", 2)):
        if value is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert limits.visible_devices() == devices


def v1(top: Path, own: str, **limit: int) -> Path:
    group = top / "memory" / own
    group.mkdir(parents=True)
    (top / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory.limit_in_bytes").write_text(f"{limit['bytes']}\n")
    (group / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    return group


def test_limits_of_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "CGROUPS", tmp_path)
    own = v1(tmp_path, "job/step", bytes=5 * 2**20)
    monkeypatch.setattr(limits, "_memory_cgroups", lambda: iter([own]))
    assert limits.memory_limit() == (5 * 2**20, "control group")
    assert limits.oom_kills() == 3
    (own / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert limits.memory_limit() is None
    (own.parent / "memory.max").write_text("1048576\n")  # of the group above, as in v2
    assert limits.memory_limit() == (1048576, "control group")


def test_ulimit() -> None:
    code = "from llmkit.processes.limits import memory_limit; print(memory_limit())"
    done = subprocess.run(
        ["sh", "-c", f'ulimit -v 2000000; exec {sys.executable} -c "{code}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "(2048000000, 'ulimit -v')"
