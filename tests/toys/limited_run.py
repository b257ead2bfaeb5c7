"""A training run whose address space is limited for real: ``limited_run.py RECIPE.json BEFORE|DURING MEGABYTES``.

BEFORE limits the process to that much more than it has before a batch is tried; DURING when the first step begins, so that a
batch that was verified does not fit any more.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import psutil

import llmkit
from llmkit.training import fit, run
from llmkit.training.allocator import give_back

BALLAST: list[bytearray] = []


def limit(megabytes: int) -> None:
    """Leave that much: the address space stays as it is, and what is free in it is taken but for the rest."""
    give_back()
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    try:
        while True:
            BALLAST.append(bytearray(2**20))
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, resource.RLIM_INFINITY))


def main() -> None:
    export = run.export

    def unlimited(*args: Any, **kwargs: Any) -> Any:
        """The process that opens the model again would inherit the limit."""
        BALLAST.clear()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return export(*args, **kwargs)

    run.export = unlimited
    recipe, when, megabytes = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
    if when == "BEFORE":
        choose = run.choose_batch

        def limited(*args: Any, **kwargs: Any) -> Any:
            limit(megabytes)
            return choose(*args, **kwargs)

        run.choose_batch = limited
    else:
        begin = fit.FittingTrainer.get_batch_samples
        seen: list[int] = []

        def first(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not seen:
                seen.append(1)
                limit(megabytes)
            return begin(self, *args, **kwargs)

        fit.FittingTrainer.get_batch_samples = first  # type: ignore[method-assign]
    result = llmkit.sft(recipe)
    print(json.dumps(dict(result.metrics)))


if __name__ == "__main__":
    main()
