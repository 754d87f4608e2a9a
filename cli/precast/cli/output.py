"""What reaches the terminal: results on standard output, everything else on standard error, errors in one line.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click

__all__ = ["Tell", "note", "print_json", "run", "step_reporter"]

Tell = Callable[[int, int], None]
"""Told how many parts of a step are done, and of how many."""


def run(cli: click.Group) -> None:
    """Run the command line and end the process."""
    from precast.runtime.errors import PrecastError, UsageError

    # Unwinding, rather than dying at once, removes what an export has staged.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report_lost, sys.unraisablehook = sys.unraisablehook, lambda lost: _come_again(lost) or report_lost(lost)
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="precast") or 0)
    except click.ClickException as error:
        # The whole help, where click 8.2 and later take a call without arguments for a mistake.
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
        else:
            context = getattr(error, "ctx", None)
            _print_error(error.format_message() + (f" See {context.command_path} -h." if context else ""), "UsageError")
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
    finally:
        sys.unraisablehook = report_lost


def _come_again(lost: Any) -> bool:
    """Python drops an interrupt that arrives while it collects garbage: let the same one arrive a moment later."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is not None:
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    return number is not None


def print_json(value: Any) -> None:
    """The one JSON document of a `--json` call."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def note(text: str) -> None:
    """A line for people, on standard error."""
    click.echo(text, err=True)


def step_reporter(quiet: bool) -> Callable[[str], AbstractContextManager[Tell]]:
    """Shows each step with its time: a bar on a terminal, a line when done; nothing if `quiet`. A step is given a
    function to tell it how much is done, and of how much."""

    @contextmanager
    def step(name: str) -> Iterator[Tell]:
        if quiet:
            yield _tell_nobody
            return
        started = time.perf_counter()
        with _bar(name) as tell:
            yield tell
        note(f"  {name:<10} {time.perf_counter() - started:6.1f} s")

    return step


def _tell_nobody(done: int, total: int) -> None:
    pass


@contextmanager
def _bar(name: str) -> Iterator[Tell]:
    if not sys.stderr.isatty():
        yield _tell_nobody
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_error(message: str, kind: str) -> None:
    message = " ".join(message.splitlines())
    if _wants_json():
        print_json({"error": {"type": kind, "message": message}})
    note(f"precast: {message}")


def _wants_json() -> bool:
    """Whatever went wrong, perhaps the parsing itself, a `--json` call gets its document."""
    return "--json" in sys.argv[1:]
