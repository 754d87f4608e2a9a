"""A pseudo-terminal with a program on it, and somebody who types there and reads what the screen is sent."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["CTRL_D", "UP", "Terminal", "without_escapes"]

CTRL_D, UP = "\x04", "\x1b[A"

_DEADLINE = 60.0
"""Seconds after which what was expected is missing; nothing waits for as long."""

_LAUNCH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Make standard input the terminal that keys such as Ctrl-C and changes of size reach the program through."""


class Terminal:
    """A program on a terminal of its own. `stdout` takes its standard output elsewhere."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        columns: int = 80,
        stdout: int | None = None,
    ) -> None:
        self._end, other = pty.openpty()
        self._unread = ""
        self._set_size(columns)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *command],
            stdin=other,
            stdout=other if stdout is None else stdout,
            stderr=other,
            start_new_session=True,
            env=env,
        )
        os.close(other)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def resize(self, columns: int) -> None:
        """Give it another width, of which the system tells the program, once that waits."""
        self._wait_until_idle()
        self._set_size(columns)

    def _set_size(self, columns: int) -> None:
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, once the program waits."""
        self._wait_until_idle()
        self.type("\x03")

    def _wait_until_idle(self) -> None:
        """Let the program come to where a signal wakes it: between two waits it would be noticed after the second."""
        end = time.monotonic() + _DEADLINE
        while self._state() != "S":
            assert time.monotonic() < end, "it never waits"

    def _state(self) -> str:
        """What Linux says of the program's first thread: S where it waits."""
        status = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8")
        return status.rpartition(")")[2].split()[0]

    def read_until(self, expected: str) -> str:
        """What comes up to the end of a text, which is read; lines end as in files."""
        end = time.monotonic() + _DEADLINE
        while expected not in self._unread:
            piece = self._read(end - time.monotonic())
            assert piece, f"{expected!r} is missing in {self._unread!r}"
            self._unread += piece
        before, _, self._unread = self._unread.partition(expected)
        return (before + expected).replace("\r\n", "\n")

    def wait(self) -> tuple[int, str]:
        """Read to the end: the exit status and what came."""
        while piece := self._read(_DEADLINE):
            self._unread += piece
        return self.process.wait(_DEADLINE), self._unread.replace("\r\n", "\n")

    def _read(self, seconds: float) -> str:
        """What comes next; nothing at the end of the program, or if it takes longer."""
        if not select.select([self._end], [], [], max(0.0, seconds))[0]:
            return ""
        try:
            return os.read(self._end, 4096).decode("utf-8", "replace")
        except OSError:
            # So Linux says that the last program has left the terminal.
            return ""


def without_escapes(text: str) -> str:
    """The text without what moves the cursor or changes how it looks."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)
