"""Messages typed on a terminal: lines that can be edited, completed and recalled, and messages of several lines."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click

__all__ = ["LineEditor", "Typed"]

_FENCE = '"""'
_MOST_LINES = 1000
"""Lines that the history's file keeps."""


_ALL_BYTES = ("input-meta on", "output-meta on", "convert-meta off")
"""Bytes beyond ASCII are characters, where readline takes them for keys if the locale has no such characters."""


class Typed(NamedTuple):
    """What was typed. A block between lines of quotation marks is never a command."""

    text: str
    is_command: bool


class LineEditor:
    """Reads messages from the terminal, by the standard library's readline where Python has it.

    `say` tells the user what they need to know beside what they type; `is_dumb` says that the terminal obeys no escape
    sequences.
    """

    def __init__(self, commands: Sequence[str], history: Path, say: Callable[[str], None], is_dumb: bool) -> None:
        self._say, self._commands, self._history = say, commands, history
        self._readline = _find_readline()
        self._is_within = False
        self._keeps = self._readline is not None and self._load_history(self._readline)
        self._sign = "> "
        if self._readline is not None:
            _bind_keys(self._readline, self._complete)
            if not (is_dumb or _is_editline(self._readline)):
                # Lines that are pasted together are one message.
                self._readline.parse_and_bind("set enable-bracketed-paste on")
                # The two marks tell readline that what is between them takes no room.
                self._sign = "\x01\x1b[1m\x02> \x01\x1b[0m\x02"

    def read(self) -> Typed | None:
        """The next message, not blank; None at the end: Ctrl-D, or Ctrl-C twice where nothing is typed."""
        was_empty = False
        while True:
            try:
                if (typed := self._read_message()).text.strip():
                    return typed
                was_empty = False
            except EOFError:
                click.echo()
                if not self._is_within:
                    return None
                self._say("That message is dropped. Ctrl-D again leaves.")
            except KeyboardInterrupt:
                click.echo()
                is_empty = not (self._is_within or self._line_buffer())
                if is_empty and was_empty:
                    return None
                if is_empty:
                    self._say("Ctrl-C again leaves, as Ctrl-D does.")
                was_empty = is_empty
            except UnicodeDecodeError as error:
                self._say(f"That line is no {error.encoding} text: it has the byte {error.object[error.start]:#04x}.")

    def _read_message(self) -> Typed:
        self._is_within = False
        line = self._read_line(self._sign)
        self._is_within = True
        if line.strip() == _FENCE:
            return Typed("\n".join(self._read_block()), False)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line("| "))
        return Typed("\n".join(lines), line.startswith("/"))

    def _read_block(self) -> Iterator[str]:
        while (line := self._read_line("| ")).strip() != _FENCE:
            yield line

    def _read_line(self, sign: str) -> str:
        with self._keeping_history():
            return _decode_again(input(sign))

    def _line_buffer(self) -> str:
        """What was typed of a line that Ctrl-C ended."""
        return self._readline.get_line_buffer() if self._readline is not None else ""

    def _complete(self, text: str, state: int) -> str | None:
        found = [command for command in self._commands if command.startswith(text)] if text.startswith("/") else []
        return found[state] if state < len(found) else None

    def _load_history(self, readline: ModuleType) -> bool:
        """Read the history's file, which is made where there is none; whether it can be written from now on."""
        try:
            _make_private(self._history)
            # An empty one is none of libedit's.
            if self._history.stat().st_size:
                readline.read_history_file(self._history)
        except OSError as error:
            self._say_unkept(error)
            return False
        readline.set_history_length(_MOST_LINES)
        return True

    @contextmanager
    def _keeping_history(self) -> Iterator[None]:
        """Append the line that is read within, if it is new, to the history's file: another chat may write to it, too,
        and whatever ends this one, it has been kept."""
        if self._readline is None or not self._keeps:
            yield
            return
        before = self._readline.get_current_history_length()
        yield
        try:
            if self._readline.get_current_history_length() > before:
                if hasattr(self._readline, "append_history_file"):
                    self._readline.append_history_file(1, self._history)
                else:
                    self._readline.write_history_file(self._history)
        except OSError as error:
            self._keeps = False
            self._say_unkept(error)

    def _say_unkept(self, error: OSError) -> None:
        self._say(f"What you type is remembered for this chat alone: {self._history} cannot be used: {error.strerror}.")


def _decode_again(line: str) -> str:
    """A line as UTF-8 where the locale, as C does, has no characters for it. Raises UnicodeDecodeError."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return line.encode(sys.stdin.encoding, "surrogateescape").decode("utf-8")
    return line


def _find_readline() -> ModuleType | None:
    """The module, which a Python that was built without it lacks."""
    try:
        return import_module("readline")
    except ImportError:
        return None


def _is_editline(readline: ModuleType) -> bool:
    """Whether it is libedit, which has other bindings, and no marks around what takes no room."""
    return "libedit" in (readline.__doc__ or "")


def _bind_keys(readline: ModuleType, complete: Callable[[str, int], str | None]) -> None:
    readline.set_completer(complete)
    # Commands are completed as a whole, whatever punctuation they have.
    readline.set_completer_delims("")
    if _is_editline(readline):
        readline.parse_and_bind("bind ^I rl_complete")
        return
    readline.parse_and_bind("tab: complete")
    for setting in _ALL_BYTES:
        readline.parse_and_bind(f"set {setting}")


def _make_private(path: Path) -> None:
    """Make a file that its owner alone can read, or make it so. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is not a regular file", str(path))
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
