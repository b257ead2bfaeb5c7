"""The table of devices: what is shipped, what users add, and what this machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.errors import UsageError
from llmkit.modeling import devices


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(devices.VARIABLE, raising=False)


def test_shipped_devices_are_complete() -> None:
    table = devices.devices()
    assert {
        "h100-80g",
        "h200",
        "a100-40g",
        "a100-80g",
        "l4",
        "l40s",
        "t4",
        "a10g",
        "v100-16g",
        "rtx4090",
        "b200",
    } <= set(table)
    for device in table.values():
        assert device.memory > 10 * devices.GIB
        assert device.peak is not None
        assert device.cost_per_hour is not None
        assert "examples" in device.where


def test_peaks_agree_with_those_of_the_meter() -> None:
    from llmkit.modeling.flops import peak_flops

    for device in devices.devices().values():
        for name in device.names:
            assert peak_flops(f"NVIDIA {name}") == device.peak, name


def test_users_change_prices_and_add_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / ".llmkit" / "devices.yaml"
    own.parent.mkdir()
    own.write_text("t4: {cost_per_hour: 0.11}\nours: {memory_gib: 10, host_memory_gib: 3}\n")
    assert devices.device("t4").cost_per_hour == 0.11
    assert devices.device("t4").memory == pytest.approx(14.6 * devices.GIB)
    ours = devices.device("ours")
    assert (ours.memory, ours.host_memory, ours.peak, ours.cost_per_hour) == (
        10 * devices.GIB,
        3 * devices.GIB,
        None,
        None,
    )
    other = tmp_path / "other.yaml"
    other.write_text("theirs: {memory_gib: 1}\n")
    monkeypatch.setenv(devices.VARIABLE, str(other))
    assert "ours" not in devices.devices()
    assert devices.device("theirs").memory == devices.GIB


def test_mistakes_in_the_users_file_are_all_told(tmp_path: Path) -> None:
    own = tmp_path / ".llmkit" / "devices.yaml"
    own.parent.mkdir()
    own.write_text("a: {memory: 3}\nb: 7\nc: {memory_gib: -1}\n")
    with pytest.raises(UsageError) as caught:
        devices.devices()
    text = str(caught.value)
    assert "a.memory: there is no such key" in text
    assert "b: expected a mapping" in text
    assert "c.memory_gib: expected a number above 0" in text


def test_an_unknown_device_is_refused_with_what_was_meant() -> None:
    with pytest.raises(UsageError, match="Did you mean h100-80g"):
        devices.device("h100-80gb")


def test_this_machine() -> None:
    cpu = devices.device("cpu")
    assert cpu.cpu
    assert cpu.memory == cpu.host_memory == devices.host_memory() > devices.GIB
    assert devices.device().count >= 1


def test_a_gpu_is_asked_for_through_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 40960'\necho 'NVIDIA A100-SXM4-40GB, 40960'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = devices.device("this")
    assert (found.name, found.count, found.memory) == ("a100-40g", 2, 40960 * 2**20)
    assert found.host_memory == devices.host_memory() / 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert devices.device("this").count == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.device("this").cpu


def test_a_limit_on_the_address_space_is_seen() -> None:
    import subprocess
    import sys

    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); from llmkit.modeling.devices import process_limit; print(process_limit())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) <= 2**30
    assert devices.process_limit() is None or devices.process_limit() > 0  # type: ignore[operator]
