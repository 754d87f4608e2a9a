"""Texts that people give: files, and standard input."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .output import note

__all__ = ["read_standard_input", "read_text"]


def read_text(path: Path, option: str) -> str:
    """The text of a file that `option` names. Raises click.UsageError where it cannot be read, or is no UTF-8."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise click.UsageError(f"{option}: {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{option}: {path} is not UTF-8 text: {_where(error)}.") from error


def read_standard_input(what: str) -> str:
    """All of standard input; someone at a terminal is told that it is awaited. Raises click.UsageError for no UTF-8."""
    if sys.stdin.isatty():
        note(f"Type {what}; Ctrl-D on a line of its own ends it.")
    try:
        # Not as the locale decodes it, which may let anything pass.
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"Standard input is not UTF-8 text: {_where(error)}.") from error


def _where(error: UnicodeDecodeError) -> str:
    line = error.object.count(b"\n", 0, error.start) + 1
    return f"line {line} has the byte 0x{error.object[error.start]:02x}"
