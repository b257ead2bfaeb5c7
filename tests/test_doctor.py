"""The doctor: every finding has a reason, nothing makes it fail."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmkit import doctor
from llmkit.stages import STAGES


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_report_is_json_and_text(offline: None) -> None:
    report = json.loads(json.dumps(doctor.examine()))
    text = doctor.as_text(report)
    assert report["torch"]["version"] in text
    assert report["hub"]["offline"] is True
    assert report["memory"]["total_gb"] > 0
    assert report["cpu"]["cores"] >= 1
    assert report["disk"]["free_gb"] > 0
    assert report["launchers"] == ["local", "slurm", "pytorchjob", "trainjob", "polyaxon"]
    assert "train" in report["extras"]
    assert report["missing"] == []
    assert all(stage in text for stage in STAGES)


def test_every_stage_says_what_it_needs() -> None:
    assert set(doctor.NEEDS) == set(STAGES)
    assert {extra for needs in doctor.NEEDS.values() for extra in needs} <= set(doctor.extra_packages())


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p in ("peft", "torch") else real(p))
    report = doctor.examine()
    text = doctor.as_text(report)
    assert report["missing"][0] == {
        "stage": "sft", "lacks": ["peft", "torch"], "command": "pip install 'llmkit[train]'"
    }  # fmt: skip
    assert "torch       problem: not installed" in text
    assert "sft cannot run: peft, torch is missing. pip install 'llmkit[train]'" in text


def test_a_probe_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    def broken(*_: Any) -> Any:
        raise PermissionError("no /proc here")

    for name in ("_cpu", "_memory", "_disk", "_extras", "_tracking", "_hub"):
        monkeypatch.setattr(doctor, name, broken)
    text = doctor.as_text(doctor.examine())
    assert text.count("problem: PermissionError: no /proc here") == 6


def test_torch_that_dies_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TORCH_PROBE", "import os; os.abort()")
    assert "ended with code -6" in doctor._torch()["problem"]
    monkeypatch.setattr(doctor, "TORCH_PROBE", "raise OSError('libcuda.so.1 is broken')")
    assert "libcuda.so.1 is broken" in doctor._torch()["problem"]
    monkeypatch.setattr(doctor, "TORCH_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "TORCH_SECONDS", 1)
    assert "more than 1 s" in doctor._torch()["problem"]


def test_a_broken_torch_stops_every_stage(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    monkeypatch.setattr(doctor, "TORCH_PROBE", "raise OSError('libcuda.so.1 is broken')")
    report = doctor.examine()
    assert [m["stage"] for m in report["missing"]] == list(STAGES)
    assert "sft cannot run: a torch that works is missing. pip install --force-reinstall" in doctor.as_text(report)


def test_tracking_server_reachable_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:geheim@127.0.0.1:{port}")
        report = doctor._tracking()
        assert report["reachable"] is True
        assert "geheim" not in json.dumps(report)
    report = doctor._tracking()
    assert report["reachable"] is False
    assert f"127.0.0.1:{port}" in report["problem"]


def test_hub_reachable_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert doctor._hub()["reachable"] is False


def test_a_gpu_is_described() -> None:
    torch = {
        "version": "2.13", "cuda_build": "13.0", "mps": False, "threads": 8,
        "devices": [{"name": "H200", "total_gb": 139.0, "free_gb": 138.0}],
    }  # fmt: skip
    assert doctor._torch_text(torch) == "2.13, CUDA 13.0, H200 (138.0 GB free of 139.0)"


def test_without_a_checkout_the_installed_metadata_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "a" / "b.py"))
    found = doctor.extra_packages()
    assert {"torch", "transformers", "peft", "mlflow"} <= set(found["train"])
    assert "s3fs" in found["s3"]


def test_the_command_loads_no_torch_itself() -> None:
    code = (
        "import sys; from llmkit.cli import main; code = main(['doctor', '--json']);"
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["llmkit"]
