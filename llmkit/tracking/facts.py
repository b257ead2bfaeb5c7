"""What every run records about where it came from: code, versions, machine and command. Nothing here imports them."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from llmkit.tracking.masking import mask_command, without_credentials

PACKAGES = ("llmkit", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "deepspeed", "mlflow")
_GIT_TIMEOUT_S = 5.0


def start_tags(stage: str, folder: Path | None = None) -> dict[str, str]:
    """Tags of a run at its start; ``folder`` is where to look for the git repository (default: working directory)."""
    tags = {
        "llmkit.stage": stage,
        "llmkit.command": mask_command(sys.argv),
        "llmkit.host": socket.gethostname(),
        "llmkit.platform": platform.platform(),
        "llmkit.cpus": str(os.cpu_count()),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": f"llmkit {stage}",
    }
    return tags | versions() | git_facts(folder or Path.cwd())


def versions() -> dict[str, str]:
    """``version.<package>`` of what is installed, from the packages' metadata, and of Python."""
    found = {"version.python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_facts(folder: Path) -> dict[str, str]:
    """Commit, branch, remote (without credentials) and whether files differ from the commit; {} outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    facts = {"mlflow.source.git.commit": commit}
    if changed is not None:
        facts["llmkit.git.dirty"] = "true" if changed else "false"
    if branch := _git(folder, "rev-parse", "--abbrev-ref", "HEAD"):
        facts["mlflow.source.git.branch"] = branch
    if remote := _git(folder, "config", "--get", "remote.origin.url"):
        facts["mlflow.source.git.repoURL"] = without_credentials(remote)
    return facts


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None without git, outside a repository, or when it takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
