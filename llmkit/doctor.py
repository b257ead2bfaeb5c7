"""What this machine has, and what is missing for which stage, with the command that installs it.

Every probe says why it failed instead of failing the report. torch is asked in a process of its own, with a time
limit: a broken driver can hang or kill the process that imports it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmkit import __version__
from llmkit.launch import LAUNCHERS
from llmkit.stages import STAGES

TORCH_SECONDS = 60
CONNECT_SECONDS = 2.0

NEEDS: dict[str, tuple[str, ...]] = {
    "sft": ("train",), "lora": ("train",), "cpt": ("train",), "prompt-test": ("train",), "check-data": ("train", "guard"),
    "embed": ("train",), "label": ("train",),
}  # fmt: skip
"""Extras without which a stage cannot run."""

TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
devices = []
for i in range(torch.cuda.device_count() if cuda else 0):
    p = torch.cuda.get_device_properties(i)
    free, total = torch.cuda.mem_get_info(i)
    devices.append({"name": p.name, "total_gb": round(total / 2**30, 1), "free_gb": round(free / 2**30, 1)})
mps = getattr(torch.backends, "mps", None)
print(json.dumps({
    "version": torch.__version__, "cuda_build": torch.version.cuda, "devices": devices,
    "mps": bool(mps and mps.is_available()), "threads": torch.get_num_threads(),
}))
"""

Report = dict[str, Any]


def examine() -> Report:
    """All probes; plain values only, so that it is its own JSON."""
    probes: dict[str, Callable[[], Any]] = {
        "python": lambda: {"version": platform.python_version(), "executable": sys.executable},
        "system": lambda: platform.platform(),
        "cpu": _cpu,
        "memory": _memory,
        "disk": _disk,
        "torch": _torch,
        "extras": _extras,
        "tracking": _tracking,
        "launchers": lambda: list(LAUNCHERS),
        "hub": _hub,
    }
    report: Report = {"llmkit": __version__}
    for name, probe in probes.items():
        try:
            report[name] = probe()
        except Exception as exc:  # noqa: BLE001  a probe may fail in any way; its reason is the finding
            report[name] = {"problem": f"{type(exc).__name__}: {exc}"}
    report["missing"] = missing(report)
    return report


def _cpu() -> Report:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    lines = [line.partition(":") for line in text.splitlines()]
    model = next((v.strip() for k, _, v in lines if k.strip() == "model name"), platform.processor() or "unknown")
    flags = next((set(v.split()) for k, _, v in lines if k.strip() in ("flags", "Features")), set())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": cores,
        "avx512": "avx512f" in flags,
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "amx": "amx_tile" in flags,
    }


def _memory() -> Report:
    import psutil

    memory = psutil.virtual_memory()
    report = {"total_gb": _gb(memory.total), "free_gb": _gb(memory.available)}
    limit = _container_limit()
    if limit is not None and limit < memory.total:
        report["container_limit_gb"] = _gb(limit)
    return report


def _container_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.is_file():
            text = path.read_text(encoding="utf-8").strip()
            return int(text) if text.isdigit() else None
    return None


def _disk() -> Report:
    usage = shutil.disk_usage(Path.cwd())
    return {"folder": str(Path.cwd()), "total_gb": _gb(usage.total), "free_gb": _gb(usage.free)}


def _torch() -> Report:
    if _version("torch") is None:
        return {"problem": "not installed"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=TORCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"importing torch took more than {TORCH_SECONDS} s"}
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        return {"problem": f"torch cannot be used: {reason}"}
    report: Report = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def _extras() -> Report:
    """Packages of each extra, from the installed metadata of llmkit, or from pyproject.toml in a checkout."""
    return {
        extra: {"packages": found, "missing": [p for p, v in found.items() if v is None]}
        for extra, found in ((e, {p: _version(p) for p in packages}) for e, packages in extra_packages().items())
        if extra not in ("dev", "bench")
    }


def extra_packages() -> dict[str, list[str]]:
    """Names of the packages that each extra brings."""
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if pyproject.is_file():
        import tomllib

        tables = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        return {extra: [_name(r) for r in requirements] for extra, requirements in tables.items()}
    found: dict[str, list[str]] = {}
    for requirement in metadata.requires("llmkit") or []:
        text, _, marker = requirement.partition(";")
        if "extra ==" in marker:
            extra = marker.partition("extra ==")[2].strip().strip("'\"")
            found.setdefault(extra, []).append(_name(text))
    return found


def _name(requirement: str) -> str:
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), len(requirement))
    return requirement[:end]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tracking() -> Report:
    from llmkit.tracking.links import default_uri
    from llmkit.tracking.masking import without_credentials

    uri = default_uri()
    parts = urlsplit(uri)
    report: Report = {"uri": without_credentials(uri)}
    if parts.scheme in ("http", "https"):
        report["problem"] = _connect(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        report["reachable"] = report["problem"] is None
    return report


def _hub() -> Report:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if offline:
        return {"offline": True, "reason": "HF_HUB_OFFLINE is set"}
    parts = urlsplit(endpoint)
    problem = _connect(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    return {"offline": False, "endpoint": endpoint, "reachable": problem is None, "problem": problem}


def _connect(host: str, port: int) -> str | None:
    """None where something listens there, else the reason."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
            return None
    except OSError as exc:
        return f"{host}:{port} does not answer: {exc}"


def missing(report: Report) -> list[Report]:
    """One entry for each stage that cannot run: what it lacks and the command that brings it."""
    found = []
    extras, torch = report.get("extras", {}), report.get("torch", {})
    for stage in STAGES:
        for extra in NEEDS.get(stage, ()):
            lacking = extras.get(extra, {}).get("missing", [])
            if lacking:
                found.append({"stage": stage, "lacks": lacking, "command": f"pip install 'llmkit[{extra}]'"})
            elif extra == "train" and "problem" in torch:
                again = "pip install --force-reinstall --no-deps torch"
                found.append({"stage": stage, "lacks": ["a torch that works"], "command": again})
    return found


def as_text(report: Report) -> str:
    """The report for people: a line a finding."""
    lines = [
        f"llmkit      {report['llmkit']}",
        f"Python      {_say(report['python'], lambda r: r['version'] + '  ' + r['executable'])}",
        f"system      {_say(report['system'], str)}",
        f"CPU         {_say(report['cpu'], _cpu_text)}",
        f"memory      {_say(report['memory'], _memory_text)}",
        f"disk        {_say(report['disk'], lambda r: '{free_gb} GB free of {total_gb} in {folder}'.format(**r))}",
        f"torch       {_say(report['torch'], _torch_text)}",
        f"tracking    {_say(report['tracking'], lambda r: r['uri'] + _reachable(r))}",
        f"hub         {_say(report['hub'], _hub_text)}",
        f"launchers   {_say(report['launchers'], ', '.join)}",
        "",
        *_extras_text(report["extras"]),
        "",
        *(_missing_text(report["missing"]) or ["Every stage has what it needs: " + ", ".join(STAGES)]),
    ]
    return "\n".join(lines)


def _say(value: Any, text: Callable[[Any], str]) -> str:
    if isinstance(value, dict) and value.get("problem") and "uri" not in value and "endpoint" not in value:
        return f"problem: {value['problem']}"
    return text(value)


def _cpu_text(cpu: Report) -> str:
    kinds = [name for name in ("avx512", "amx") if cpu[name]]
    return f"{cpu['model']}, {cpu['cores']} cores, {'bf16' if cpu['bf16'] else 'no bf16'}" + "".join(
        f", {k}" for k in kinds
    )


def _memory_text(memory: Report) -> str:
    limit = f" (this container may use {memory['container_limit_gb']} GB)" if "container_limit_gb" in memory else ""
    return f"{memory['free_gb']} GB free of {memory['total_gb']}{limit}"


def _torch_text(torch: Report) -> str:
    devices = [f"{d['name']} ({d['free_gb']} GB free of {d['total_gb']})" for d in torch["devices"]]
    devices += ["Apple GPU"] if torch["mps"] else []
    build = f"CUDA {torch['cuda_build']}" if torch["cuda_build"] else "CPU build"
    return f"{torch['version']}, {build}, {', '.join(devices) or 'no GPU'}"


def _hub_text(hub: Report) -> str:
    return f"offline: {hub['reason']}" if hub["offline"] else hub["endpoint"] + _reachable(hub)


def _reachable(report: Report) -> str:
    if "reachable" not in report:
        return ""
    return ", reachable" if report["reachable"] else f", NOT reachable ({report['problem']})"


def _extras_text(extras: Report) -> list[str]:
    if "problem" in extras:
        return [f"extras      problem: {extras['problem']}"]
    lines = []
    for extra, found in extras.items():
        have = [f"{p} {v}" for p, v in found["packages"].items() if v is not None]
        lines.append(f"[{extra}] " + (", ".join(have) or "nothing installed"))
        if found["missing"]:
            lines.append(f"    not installed: {', '.join(found['missing'])}; pip install 'llmkit[{extra}]'")
    return lines


def _missing_text(found: list[Report]) -> list[str]:
    return [f"{m['stage']} cannot run: {', '.join(m['lacks'])} is missing. {m['command']}" for m in found]


def _gb(size: int) -> float:
    return round(size / 2**30, 1)
