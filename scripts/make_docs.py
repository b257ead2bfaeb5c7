"""Write the documents that are made from the code: ``python scripts/make_docs.py [--check]``.

``--check`` writes nothing and ends with 1 where a document is behind the code.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from llmkit.schema import reference

REPO = Path(__file__).resolve().parent.parent

CLI_INTRO = """\
# Command reference

*Made from `llmkit --help` by `python scripts/make_docs.py`; do not edit it.*

What each exit code means is in [Exit codes](decisions/exit-codes.md).
"""


def cli_reference() -> str:
    """The help page of llmkit and of each of its commands."""
    from llmkit.cli import build_app

    app = build_app()
    names = [command.name or "" for command in app.registered_commands]
    pages = [("llmkit", help_page()), *((f"llmkit {name}", help_page(name)) for name in names)]
    return CLI_INTRO + "".join(f"\n## {title}\n\n```text\n{page}\n```\n" for title, page in pages)


def help_page(*command: str) -> str:
    """What ``llmkit COMMAND --help`` prints on a terminal of 100 columns, without trailing blanks."""
    env = os.environ | {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", *command, "--help"], capture_output=True, text=True, check=True, env=env
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/recipe-reference.md": reference,
    "docs/cli-reference.md": cli_reference,
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
