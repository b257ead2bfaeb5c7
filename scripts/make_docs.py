"""Write the documents that are made from the code: ``python scripts/make_docs.py [--check]``.

``--check`` writes nothing and ends with 1 where a document is behind the code.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

from llmkit import cli_docs, schema

REPO = Path(__file__).resolve().parent.parent

DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/recipe-reference.md": schema.reference,
    "docs/cli-reference.md": cli_docs.reference,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check: bool = parser.parse_args().check
    behind = []
    for name, make in DOCUMENTS.items():
        path = REPO / name
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        new = make()
        if old == new:
            continue
        if not check:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {name}")
            continue
        behind.append(name)
        changes = difflib.unified_diff(old.splitlines(), new.splitlines(), name, "the code", lineterm="", n=0)
        print("\n".join(list(changes)[:20]))
    if behind:
        print(f"behind the code: {', '.join(behind)}. Run: .venv/bin/python scripts/make_docs.py")
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
