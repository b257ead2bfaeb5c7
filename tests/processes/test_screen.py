"""What rank 0 writes: to the screen as it is, into the log as lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.processes.screen import Screen, last_lines


def test_a_pipe_is_shown_and_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    screen = Screen(tmp_path / "log")
    os.write(screen.child_end, "step 1\nstep 2\r\nlöss\nhalf".encode())
    screen.give_away()
    screen.pump(1)
    screen.drain()
    assert screen.tail(3) == ["step 2", "löss", "half"]
    screen.close()
    assert (tmp_path / "log").read_text() == "step 1\nstep 2\nlöss\nhalf\n"
    assert capfd.readouterr().err == "step 1\nstep 2\r\nlöss\nhalf"


def test_what_moved_the_cursor_is_not_in_the_log(tmp_path: Path) -> None:
    screen = Screen(tmp_path / "log")
    os.write(screen.child_end, b"\x1b[?25l10%\r\x1b[2K50%\r\x1b[2Ka note\n\x1b[1mlive\x1b[0m 60%\rlive 70%")
    screen.give_away()
    screen.pump(1)
    assert screen.tail(5) == ["a note", "live 70%"]
    screen.close()


def test_a_screen_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_descriptor: int, _data: bytes) -> int:
        raise BrokenPipeError

    screen = Screen(tmp_path / "log")
    os.write(screen.child_end, b"one\n")
    monkeypatch.setattr(os, "write", gone)
    screen.pump(1)
    assert screen.tail(1) == ["one"]
    screen.close()


def test_a_terminal_is_a_terminal_for_the_process_too(tmp_path: Path) -> None:
    """The live line of rank 0 needs one; its size is the real one's."""
    code = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from llmkit.processes.screen import Screen\n"
        "screen = Screen(Path('log'))\n"
        "screen.pump(0)\n"
        "child = 'import os, sys; print(sys.stderr.isatty(), os.get_terminal_size(2).columns, file=sys.stderr)'\n"
        "process = subprocess.Popen([sys.executable, '-c', child], stderr=screen.child_end)\n"
        "screen.give_away()\n"
        "while process.poll() is None: screen.pump(0.1)\n"
        "screen.drain(); screen.close()\n"
    )
    import pexpect

    done = pexpect.spawn(sys.executable, ["-c", code], cwd=str(tmp_path), dimensions=(20, 77), timeout=30)
    done.expect("True 77")
    done.expect(pexpect.EOF)
    assert (tmp_path / "log").read_text() == "True 77\n"


def test_last_lines_of_this_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n")
    offset = log.stat().st_size
    with log.open("a") as file:
        file.write("\n".join(f"line {i}" for i in range(900)) + "\n\n")
    assert last_lines(log, offset, 2) == ["line 898", "line 899"]
    log.write_text("old\nnew\n")
    assert last_lines(log, offset, 5) == ["new"]
    assert last_lines(tmp_path / "none", 0, 5) == []


def test_nothing_heavy_is_loaded() -> None:
    code = "import llmkit.launch.local, sys; print(sorted({'torch', 'numpy', 'mlflow', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
