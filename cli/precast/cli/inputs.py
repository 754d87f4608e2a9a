"""Read texts from files and standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from .output import note

__all__ = ["note_blank_lines", "read_lines", "read_standard_input", "read_text"]


def read_text(path: Path, option: str) -> str:
    """Read a file that `option` names. Raises click.UsageError where it cannot be read, or is no UTF-8."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise click.UsageError(f"{option}: {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{option}: {path} is not UTF-8 text: {_place_of(error)}.") from error


def read_lines() -> Iterator[str]:
    """Yield the lines of standard input as they come.

    Blank ones are left out, and a note says which. Raises click.UsageError for a line that is not UTF-8, and where
    there is no other.
    """
    if sys.stdin.isatty():
        note("Type texts, one a line; Ctrl-D on a line of its own ends them.")
    blank, count = [], 0
    for count, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"Standard input is not UTF-8 text: line {count} has the byte {line[error.start]:#04x}."
            ) from error
        if text.strip():
            yield text
        else:
            blank.append(count)
    if count == len(blank):
        raise click.UsageError("Standard input holds no text.")
    if blank:
        note_blank_lines(blank, "Standard input")


def note_blank_lines(lines: list[int], name: str) -> None:
    """Say which lines were left out."""
    listed = ", ".join(map(str, lines[:10])) + (", …" if len(lines) > 10 else "")
    note(f"Left out as blank: line{'s' if len(lines) > 1 else ''} {listed} of {name}.")


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
