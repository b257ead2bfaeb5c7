"""One machine of a run on a cluster: ``python -m llmkit.processes.node --output DIR -- torchrun … llmkit run DIR/recipe.yaml``.

torchrun ends with 1 whatever its workers ended with, dies of SIGUSR1, and gives its workers 30 seconds after SIGTERM. Who
restarts pods or jobs reads the number, and a checkpoint may take longer. So this starts the command, hands signals on to the
run's own processes, and ends with the run's own exit code, which is in ``result.json``.

With ``--recipe`` (a file that was mounted) the frozen recipe is put into the output folder first, where it is not there yet.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from llmkit import __version__, rundir, stages, uris
from llmkit.errors import LlmkitError
from llmkit.recipe import Recipe, load_recipe

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmkit.processes.node", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", required=True, help="the run's output folder, or its URI")
    parser.add_argument("--stage", help="the run's stage; with --recipe")
    parser.add_argument("--recipe", type=Path, help="the frozen recipe, where it is not in the output folder")
    parser.add_argument("command", nargs="+", help="what is started, after --")
    given = parser.parse_args(argv)
    try:
        if given.recipe is not None:
            put_recipe(given.output, given.stage, given.recipe)
    except LlmkitError as error:
        print(f"llmkit: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return supervise(given.command, uris.workplace(given.output))


def put_recipe(output: str, stage: str, source: Path) -> None:
    """Freeze the recipe in its folder, unless it is there. ``UsageError`` where the folder is another run's."""
    recipe: Recipe = load_recipe(source, stages.load(stage).Recipe)
    folder = Path(output)
    text = source.read_text(encoding="utf-8")
    frozen = folder / rundir.RECIPE
    if frozen.is_file() and frozen.read_text(encoding="utf-8") == text and (folder / rundir.RUN).is_file():
        return
    found = rundir.examine(folder, stage, recipe, "auto", None)
    if found.state == "done":
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = rundir.RunFile.read(folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rundir.freeze(folder, stage, recipe, before.data if before else {}, __version__, now)


def supervise(command: Sequence[str], folder: Path) -> int:
    """Run the command; its exit code, or the run's own where the command failed for it."""
    began = time.time()
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            _signal_run(child.pid, number)

    for number in SIGNALS:
        signal.signal(number, hand_on)
    child = subprocess.Popen(command)
    for early in asked:  # came between the handlers and the child
        _signal_run(child.pid, early)
    code = child.wait()
    code = code if code >= 0 else 128 - code
    return code if code == 0 else _own_code(folder, code, began)


def _signal_run(pid: int, number: int) -> None:
    """Signal the run's processes: torchrun's workers, or the command itself where it has none."""
    import psutil

    try:
        command = psutil.Process(pid)
        workers = command.children() if _is_torchrun(command) else []
    except psutil.Error:
        return
    for process in workers or [command]:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _is_torchrun(process: object) -> bool:
    return any(part.endswith("torchrun") or part == "torch.distributed.run" for part in process.cmdline()[:3])  # type: ignore[attr-defined]


def _own_code(folder: Path, code: int, began: float) -> int:
    """What the run itself said, where it said it in this start; the folder may be on storage that shows it late."""
    path = folder / rundir.RESULT
    for _ in range(10):
        result = rundir.read_result(folder)
        if result is not None and path.stat().st_mtime >= began - 1 and result.exit_code:
            return result.exit_code
        time.sleep(0.2)
    return code


if __name__ == "__main__":
    sys.exit(main())
