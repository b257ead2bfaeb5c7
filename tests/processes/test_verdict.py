"""What the ends of several processes mean together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import DataError, ProcessLostError, StoppedEarly, UsageError, WontFitError
from llmkit.processes.verdict import End, verdict
from llmkit.ranks import Report

LOST = Report("ProcessLostError", "Another process of this run is gone: Connection closed by peer", 1)
STOPPED = Report("StoppedEarly", "Stopped by SIGTERM after step 3 of 9", 138)
DATA = Report("DataError", "row 17 is broken", 3)


def end(rank: int, code: int, report: Report | None = None, **more: Any) -> End:
    return End(rank, code, Path(f"out/logs/rank-{rank}.log"), report, **more)


def test_all_done_is_no_error() -> None:
    assert verdict([end(1, 0), end(0, 0)]) is None


def test_a_process_killed_is_the_reason_whatever_the_others_say() -> None:
    error = verdict([end(0, 1, LOST), end(1, -9, tail=["step 1", "step 2"]), end(2, 1, LOST)])
    assert isinstance(error, ProcessLostError)
    assert str(error).startswith("Rank 1 of 3 was killed by SIGKILL (signal 9): probably out of memory")
    assert str(error).endswith("Its last lines (out/logs/rank-1.log):\n  step 1\n  step 2")


def test_what_the_kernel_counted_is_said() -> None:
    text = str(verdict([end(0, -9)], kills=1, limit=(2 * 2**30, "control group")))
    assert text.startswith(
        "The run's process was killed by SIGKILL (signal 9): out of memory (the kernel killed a process"
    )
    assert "this run may use 2,048 MB (control group)" in text
    assert "out/logs/rank-0.log" in text
    assert "2 processes" in str(verdict([end(0, -9)], kills=2))


def test_a_library_that_gave_up_for_want_of_memory_is_out_of_memory() -> None:
    """OpenBLAS leaves by exit(1), C++ by abort()."""
    for code, line in ((1, "OpenBLAS error: Memory allocation still failed"), (-6, "what():  std::bad_alloc")):
        error = verdict([end(0, code, tail=["step 1", line])])
        assert isinstance(error, WontFitError)
        assert "for want of memory" in str(error)


@pytest.mark.parametrize(("code", "said"), [(-11, "SIGSEGV"), (-6, "SIGABRT"), (-35, "signal 35"), (7, "exit code 7")])
def test_other_silent_ends(code: int, said: str) -> None:
    assert said in str(verdict([end(0, 0), end(1, code)]))


def test_the_own_error_of_a_process_comes_before_what_others_noticed() -> None:
    error = verdict([end(0, 1, LOST), end(1, 3, DATA)])
    assert isinstance(error, DataError)
    assert str(error) == "row 17 is broken\n(rank 1; its output: out/logs/rank-1.log)"


def test_an_error_of_all_is_told_as_rank_0_tells_it() -> None:
    assert str(verdict([end(1, 3, DATA), end(0, 3, DATA)])) == "row 17 is broken"
    recipe = Report("RecipeError", "1 mistake in the recipe", 2)
    assert type(verdict([end(1, 2, recipe), end(0, 2, recipe)])) is UsageError


def test_a_stop_counts_only_without_another_error() -> None:
    assert isinstance(verdict([end(1, 138, STOPPED), end(0, 138, STOPPED)]), StoppedEarly)
    assert isinstance(verdict([end(1, 138, STOPPED), end(0, 3, DATA)]), DataError)
    assert isinstance(verdict([end(1, 130, Report("LlmkitError", "interrupted", 130)), end(0, 0)]), KeyboardInterrupt)


def test_a_process_that_hung_is_named() -> None:
    late = Report("ProcessLostError", "Another process of this run did not answer in time: …", 1)
    text = str(verdict([end(0, 1, late), end(1, -9, ended="it is stopped (SIGSTOP)", tail=["step 4"])]))
    assert text.startswith("Another process of this run did not answer in time")
    assert "Rank 1 was ended: it is stopped (SIGSTOP).\nIts last lines" in text
    assert "Rank 1 had to be ended" in str(verdict([end(0, 0), end(1, -9, ended="it did not end by itself")]))
