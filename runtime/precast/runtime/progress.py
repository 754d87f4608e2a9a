"""A progress bar on standard error, for people: only on a terminal, only when the work takes a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from .terminal import printable

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["progress", "quiet", "say", "wanted"]

DELAY_SECONDS = 0.5
_is_quiet = Event()


def quiet() -> None:
    """Show no bars from now on in this process (`-q`)."""
    _is_quiet.set()


def wanted() -> bool:
    """Whether bars are shown at all: on a terminal, unless `quiet()` was called."""
    return sys.stderr.isatty() and not _is_quiet.is_set()


def say(text: str) -> None:
    """Print one line, escaped, where bars are shown."""
    if wanted():
        sys.stderr.write(printable(text, keep="") + "\n")


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(amount)`. The bar appears once the work has gone on for half a second."""
    if not wanted():
        yield lambda amount: None
        return
    started, done = time.monotonic(), 0
    bar: Progress | None = None

    def advance(amount: int) -> None:
        nonlocal done, bar
        done += amount
        if bar is None and time.monotonic() - started > DELAY_SECONDS:
            bar = _start_bar(title, total)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _start_bar(title: str, total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(title, total=total)
    bar.start()
    return bar
