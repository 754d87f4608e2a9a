"""What reaches the terminal: results on standard output, everything else on standard error, errors in one line.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click

__all__ = ["note", "print_json", "run", "step_reporter"]


def run(cli: click.Group) -> None:
    """Run the command line and end the process."""
    from precast.runtime.errors import PrecastError, UsageError

    # Unwinding, rather than dying at once, removes what an export has staged.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="precast") or 0)
    except click.ClickException as error:
        if not _wants_json():
            error.show()
        else:
            _print_error(error.format_message(), "UsageError")
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        note("Interrupted; nothing was changed.")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PrecastError as error:
        if os.environ.get("PRECAST_DEBUG") == "1":
            raise
        _print_error(str(error), type(error).__name__)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def print_json(value: Any) -> None:
    """The one JSON document of a `--json` call."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def note(text: str) -> None:
    """A line for people, on standard error."""
    click.echo(text, err=True)


def step_reporter(quiet: bool) -> Callable[[str], AbstractContextManager[Any]]:
    """Shows each step with its time: a spinner on a terminal, a line when done; nothing if `quiet`."""

    @contextmanager
    def step(name: str) -> Iterator[None]:
        if quiet:
            yield
            return
        started = time.perf_counter()
        with _spinner(name):
            yield
        note(f"  {name:<10} {time.perf_counter() - started:6.1f} s")

    return step


@contextmanager
def _spinner(name: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(name, total=None)
        yield


def _print_error(message: str, kind: str) -> None:
    if _wants_json():
        print_json({"error": {"type": kind, "message": message}})
    note(f"precast: {message}")


def _wants_json() -> bool:
    """Whatever went wrong, perhaps the parsing itself, a `--json` call gets its document."""
    return "--json" in sys.argv[1:]
