"""A progress bar on standard error, for people: only on a terminal, only when the work takes a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress", "quiet"]

DELAY_SECONDS = 0.5
_enabled = True


def quiet() -> None:
    """No bars from now on in this process (`-q`)."""
    global _enabled
    _enabled = False


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(amount)`. The bar appears once the work has gone on for half a second."""
    if not (_enabled and sys.stderr.isatty()):
        yield lambda amount: None
        return
    started, done, bar = time.monotonic(), 0, None

    def advance(amount: int) -> None:
        nonlocal done, bar
        done += amount
        if bar is None and time.monotonic() - started > DELAY_SECONDS:
            bar = _bar(title, total)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _bar(title: str, total: int):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(title, total=total)
    bar.start()
    return bar
