"""What rank 0 writes goes through here: to the user's screen as it comes, and line by line into a log."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import sys
import termios
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from llmkit.progress import in_notebook

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_KEPT_LINES = 200
_LONGEST_LINE = 8192


class Screen:
    """``child_end`` is given to a process as its stdout and stderr; it is a terminal where stderr is one."""

    def __init__(self, log: Path) -> None:
        self._notebook = in_notebook()
        self._terminal = not self._notebook and sys.stderr.isatty()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end, self.child_end = os.openpty() if self._terminal else os.pipe()
        self._open, self._shown = True, True
        self._log: BinaryIO = log.open("ab")
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._rest = b""

    def give_away(self) -> None:
        """The process has its end; without ours the last word of the last process ends the stream."""
        os.close(self.child_end)

    def pump(self, seconds: float) -> None:
        """Show what is there, or comes within ``seconds``."""
        self._copy_size()
        ready, _, _ = select.select([self._end] if self._open else [], [], [], seconds)
        if ready:
            self._take()

    def drain(self) -> None:
        """Show what a process that is gone has left."""
        while self._open and select.select([self._end], [], [], 0)[0]:
            self._take()

    def tail(self, count: int) -> list[str]:
        """The last lines, without what only moves a cursor."""
        lines = [*self._lines, _plain(self._rest)]
        return [line for line in lines if line.strip()][-count:]

    def close(self) -> None:
        if self._rest:
            self._log.write(_plain(self._rest).encode() + b"\n")
        self._log.close()
        os.close(self._end)

    def _take(self) -> None:
        try:
            data = os.read(self._end, 65536)
        except OSError:  # the other end of a pseudo-terminal is closed
            data = b""
        self._open = bool(data)
        self._show(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LONGEST_LINE:]
        for line in map(_plain, lines):
            self._lines.append(line)
            self._log.write(line.encode() + b"\n")
        self._log.flush()

    def _show(self, data: bytes) -> None:
        if not self._shown:
            return
        try:
            if self._notebook:  # what is written to the descriptor ends in the log of the notebook's server
                sys.stderr.write(self._decoder.decode(data))
                sys.stderr.flush()
                return
            while data:
                data = data[os.write(2, data) :]
        except OSError:  # whoever looked at it has left: the run goes on, and the log has it all
            self._shown = False

    def _copy_size(self) -> None:
        if self._terminal:
            with suppress(OSError):
                fcntl.ioctl(self._end, termios.TIOCSWINSZ, fcntl.ioctl(2, termios.TIOCGWINSZ, b"\0" * 8))


def _plain(line: bytes) -> str:
    """What is to be seen of a line in the end: what was overwritten and control sequences are left out."""
    text = _ESCAPE.sub("", line.decode(errors="replace")).rstrip("\r")
    return text.rpartition("\r")[2]


def last_lines(path: Path, offset: int, count: int) -> list[str]:
    """The last lines that a log got since it had ``offset`` bytes."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(offset, file.tell() - count * 500))
            lines = map(_plain, file.read().split(b"\n"))
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]
