"""Run ``soup data doctor`` on folders that template_defects.py wrote; needs soup-cli, and nothing of llmkit.

python benchmarks/soup_doctor.py JOBS.json ANSWERS.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from soup_cli.cli import app
from typer.testing import CliRunner


def doctor(folder: Path, max_length: int, last: bool) -> dict[str, str]:
    """Verdict of each of Soup's checks; ``{"crash": "MAJOR"}`` when it gives none."""
    os.chdir(folder)
    report = Path("soup.json")
    report.unlink(missing_ok=True)
    wanted = ["data", "doctor", "data.jsonl", "--model", ".", "--max-length", str(max_length), "--train-on-eot"]
    wanted += ["--format", "chatml", "--output", str(report), *(["--mask-history"] if last else [])]
    CliRunner().invoke(app, wanted)
    if not report.is_file():
        return {"crash": "MAJOR"}
    checks = json.loads(report.read_text(encoding="utf-8"))["checks"]
    return {check["name"]: check["verdict"] for check in checks}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = Path(sys.argv[2]).resolve()
    made = [doctor(Path(job["folder"]).resolve(), job["max_length"], job["last"]) for job in jobs]
    answers.write_text(json.dumps(made), encoding="utf-8")


if __name__ == "__main__":
    main()
