"""What the ends of a run's processes mean together: success, or the one error that the user should read."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmkit import errors
from llmkit.errors import LlmkitError, ProcessLostError, StoppedEarly, WontFitError
from llmkit.faults import EXIT_INTERRUPTED, tells_of_memory
from llmkit.progress import number
from llmkit.ranks import Report

CRASHES: dict[int, str] = {
    signal.SIGSEGV: "it crashed in native code (a library or driver)",
    signal.SIGBUS: "it crashed in native code, or a file it had mapped was cut short (is /dev/shm or the disk full?)",
    signal.SIGABRT: "it gave up in native code: a time-out of NCCL, no memory left, or a failed check",
    signal.SIGILL: "a library was built for another kind of CPU",
    signal.SIGFPE: "it crashed in native code (a library or driver)",
}


@dataclass(frozen=True)
class End:
    """How one process ended, in the order in which it was seen.

    ``code`` is as subprocess has it: negative for a signal. ``report`` is what the process said of it itself, ``tail``
    its last lines. ``ended`` says why we ended it, where we did.
    """

    rank: int
    code: int
    log: Path
    report: Report | None = None
    tail: Sequence[str] = field(default_factory=list)
    ended: str = ""


def verdict(ends: Sequence[End], *, kills: int = 0, limit: tuple[int, str] | None = None) -> BaseException | None:
    """The error that the run ends with, None for success.

    ``kills`` is how many processes the kernel killed for want of memory meanwhile, ``limit`` the memory allowed.
    A process that died without a word comes first, then what a process said of itself, a stop with a checkpoint after
    any other error, and last the processes that only noticed that another one was gone.
    """
    silent = [e for e in ends if e.code != 0 and e.report is None and not e.ended]
    if silent:
        wont_fit = silent[0].code != -signal.SIGKILL and any(map(tells_of_memory, silent[0].tail))
        return (WontFitError if wont_fit else ProcessLostError)(_died(silent[0], len(ends), kills, limit))
    said = [(e, e.report) for e in ends if e.report is not None and e.code != 0]
    own = [pair for pair in said if pair[1].kind != ProcessLostError.__name__]
    failed = [pair for pair in own if pair[1].kind != StoppedEarly.__name__]
    if failed or own:
        return _as_error(*_speaker(failed or own))
    hung = [e for e in ends if e.ended]
    if said:
        notes = [f"Rank {e.rank} was ended: {e.ended}.{_last_words(e)}" for e in hung]
        return ProcessLostError("\n".join([said[0][1].message, *notes]))
    if hung:
        return ProcessLostError(f"Rank {hung[0].rank} had to be ended: {hung[0].ended}.{_last_words(hung[0])}")
    return None


def _speaker(said: Sequence[tuple[End, Report]]) -> tuple[End, Report]:
    """The first to end, or rank 0 where it says the same: its output is what the user has seen."""
    first = said[0]
    return next((pair for pair in said if pair[0].rank == 0 and pair[1].kind == first[1].kind), first)


def _as_error(end: End, report: Report) -> BaseException:
    if report.exit_code == EXIT_INTERRUPTED:
        return KeyboardInterrupt("interrupted")
    kind = getattr(errors, report.kind, LlmkitError)
    if kind is errors.RecipeError:  # takes problems, and its text is made already
        kind = errors.UsageError
    where = f"\n(rank {end.rank}; its output: {end.log})" if end.rank else ""
    error: LlmkitError = kind(report.message + where)
    return error


def _died(end: End, processes: int, kills: int, limit: tuple[int, str] | None) -> str:
    who = f"Rank {end.rank} of {processes}" if processes > 1 else "The run's process"
    if end.code != -signal.SIGKILL and any(map(tells_of_memory, end.tail)):
        how = f"{who} ended for want of memory, as its last lines say.\n{_LESS}."
    elif end.code > 0:
        how = f"{who} ended with exit code {end.code} without saying why."
    else:
        how = f"{who} was killed by {_signal_name(-end.code)}: {_why(-end.code, kills, limit)}."
    return f"{how}\nThe same command goes on from the last checkpoint, if there is one.{_last_words(end)}"


def _why(signal_number: int, kills: int, limit: tuple[int, str] | None) -> str:
    if signal_number != signal.SIGKILL:
        return CRASHES.get(signal_number, "someone ended it")
    allowed = f"; this run may use {number(limit[0] // 2**20)} MB ({limit[1]})" if limit else ""
    if kills:
        times = "a process" if kills == 1 else f"{kills} processes"
        return f"out of memory (the kernel killed {times} for it{allowed}).\n{_LESS}"
    return f"probably out of memory, although the kernel does not say so here, or someone ended it{allowed}"


_LESS = (
    "Try train.per_device_train_batch_size=1 with a larger train.gradient_accumulation_steps, a smaller "
    "data.max_length, train.gradient_checkpointing=true, or fewer launch.processes"
)


def _signal_name(value: int) -> str:
    try:
        return f"{signal.Signals(value).name} (signal {value})"
    except ValueError:
        return f"signal {value}"


def _last_words(end: End) -> str:
    if not end.tail:
        return f"\nIt had written nothing ({end.log})."
    return "\n".join([f"\nIts last lines ({end.log}):", *(f"  {line}" for line in end.tail)])
