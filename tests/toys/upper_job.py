"""A batch job with the toy work, as a process that can be killed: ``python upper_job.py FOLDER`` with ``rows.jsonl``
in the folder."""

from __future__ import annotations

import sys
from pathlib import Path

from llmkit.context import RunContext, StopFlag
from llmkit.inference.batch import work
from llmkit.inference.batch.run import run_batch
from llmkit.inference.batch.settings import BatchRecipe
from llmkit.progress import open_progress
from llmkit.tracking import NullTracker


def main(folder: Path) -> None:
    work.WORKS["upper"] = "upper_work:UpperWork"
    out = folder / "out"
    out.mkdir(exist_ok=True)
    recipe = BatchRecipe.model_validate({
        "name": "x", "output_dir": str(out), "input": {"path": str(folder / "rows.jsonl")}, "output": {"rows_per_shard": 10},
    })  # fmt: skip
    with open_progress() as progress:
        run_batch(recipe, RunContext(out, NullTracker(), progress, StopFlag()), "upper")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
