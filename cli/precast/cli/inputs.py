"""Read texts from files and standard input."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from .output import note

__all__ = ["read_lines", "read_standard_input", "read_text"]


def read_text(path: Path, option: str) -> str:
    """Read a file that `option` names. Raises click.UsageError where it cannot be read, or is no UTF-8."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise click.UsageError(f"{option}: {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{option}: {path} is not UTF-8 text: {_place_of(error)}.") from error


def read_lines(path: Path | None, option: str) -> Iterator[str]:
    """Yield the lines of a file that `option` names, or of standard input, where it is None or "-", as they come.

    Blank ones are left out, and a note says which. Raises click.UsageError as `read_text` does, and where there is no
    other line.
    """
    named = None if path is None or str(path) == "-" else path
    if named is None and sys.stdin.isatty():
        note("Type texts, one a line; Ctrl-D on a line of its own ends them.")
    # A file is read at once, so that what is wrong with it is known before a model is opened.
    whole = io.BytesIO(read_text(named, option).encode()) if named else sys.stdin.buffer
    return _skip_blanks(whole, f"{named}" if named else "Standard input")


def _skip_blanks(whole: Iterable[bytes], name: str) -> Iterator[str]:
    blank, count = [], 0
    for count, line in enumerate(whole, 1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"{name} is not UTF-8 text: line {count} has the byte {line[error.start]:#04x}."
            ) from error
        if text.strip():
            yield text
        else:
            blank.append(count)
    if count == len(blank):
        raise click.UsageError(f"{name} holds no text.")
    if blank:
        listed = ", ".join(map(str, blank[:10])) + (", …" if len(blank) > 10 else "")
        note(f"Left out as blank: line{'s' if len(blank) > 1 else ''} {listed} of {name}.")


def read_standard_input(what: str) -> str:
    """Read all of standard input, with a note if it is a terminal. Raises click.UsageError for no UTF-8."""
    if sys.stdin.isatty():
        note(f"Type {what}; Ctrl-D on a line of its own ends it.")
    try:
        # Not as the locale decodes it, which may let anything pass.
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"Standard input is not UTF-8 text: {_place_of(error)}.") from error


def _place_of(error: UnicodeDecodeError) -> str:
    line = error.object.count(b"\n", 0, error.start) + 1
    return f"line {line} has the byte 0x{error.object[error.start]:02x}"
