"""One of several processes of tests/integration/test_zero.py: ``zero_worker.py JOB.json``, under torchrun.

Trains every setting of the job one after the other, then, where the job says so, throws the end of the run away and goes
on from the checkpoint in its middle. The first process writes what it saw.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from training_runs import history, weights

import llmkit.training.outcome as outcome
from llmkit import api

starts = 0


def train(stage: str, recipe: dict[str, Any]) -> None:
    """A run of all processes; each meets the others under another number."""
    global starts
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(starts)
    starts += 1
    api.run(stage, recipe)


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def main(job: dict[str, Any], first: bool) -> None:
    import torch

    # The export is opened in a process of its own by other tests.
    outcome.verify = lambda *_: SimpleNamespace(relative=0.0)  # type: ignore[assignment]
    spy = _Spy()
    for name, run in job["runs"].items():
        out = Path(run["recipe"]["output_dir"])
        spy.start()
        train(run["stage"], run["recipe"])
        seen: dict[str, Any] = {"loading": spy.seen}
        if first:
            seen["losses"] = history(out)
            torch.save(weights(out), out / "weights.pt")
        if run["resumes"]:
            if first:
                last = max((out / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
                shutil.rmtree(last)
                (out / "result.json").unlink()
            barrier()
            train(run["stage"], run["recipe"])
            if first:
                seen["resumed"] = history(out)
                torch.save(weights(out), out / "resumed.pt")
        if first:
            (out / "seen.json").write_text(json.dumps(seen))
        barrier()
        print(f"{name} done", flush=True)


class _Spy:
    """What a process held when it had loaded its share: elements of all weights, of its own, and most at once."""

    def __init__(self) -> None:
        import llmkit.training.run as run

        self.seen: dict[str, int] = {}
        self._real = run.load_divided
        run.load_divided = self._load  # type: ignore[assignment]

    def start(self) -> None:
        self.seen = {}

    def _load(self, *args: Any) -> Any:
        import deepspeed

        real, most = deepspeed.zero.GatheredParameters, [0]

        def gathered(weights: Any, *more: Any, **others: Any) -> Any:
            most.append(sum(w.ds_numel for w in weights))
            return real(weights, *more, **others)

        deepspeed.zero.GatheredParameters = gathered
        try:
            model = self._real(*args)
        finally:
            deepspeed.zero.GatheredParameters = real
        shares = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
        self.seen = {
            "all": sum(p.ds_numel for p in shares),
            "here": sum(p.ds_tensor.numel() for p in shares),
            "whole": sum(p.numel() for p in shares),
            "most_at_once": max(most),
        }
        return model


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), os.environ["RANK"] == "0")
