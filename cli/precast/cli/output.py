"""Output to the terminal: results on standard output, everything else on standard error, errors in one line.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import click

from precast.runtime.terminal import escaped_json, printable

__all__ = [
    "Progress", "bar", "describe_progress", "echo", "echo_answer", "json_text", "note", "print_json", "run_cli",
    "step_reporter",
]  # fmt: skip

Progress = Callable[..., None]
"""Called with how many parts of a step are done, of how many, and what is done now."""


def run_cli(cli: click.Command) -> None:
    """Run the command line and end the process."""
    from precast.runtime.errors import PrecastError, UsageError

    # Unwinding, rather than dying at once, removes what an export has staged.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report_lost, sys.unraisablehook = sys.unraisablehook, lambda lost: _raise_again(lost) or report_lost(lost)
    _escape_unencodable(sys.stdout)
    try:
        with _only_our_warnings():
            _check_words(sys.argv[1:])
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
        _print_error("Interrupted.", "Interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PrecastError as error:
        if _is_debugged():
            raise
        _print_error(str(error), type(error).__name__)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except SystemExit:
        raise
    except BaseException as error:
        # Libraries raise anything, and a panic in Rust is no Exception.
        if _is_debugged():
            raise
        _print_error(_describe_unexpected(error), type(error).__name__)
        sys.exit(1)
    finally:
        sys.unraisablehook = report_lost


def _is_debugged() -> bool:
    return os.environ.get("PRECAST_DEBUG") == "1"


def _describe_unexpected(error: BaseException) -> str:
    """The line for an error that is not ours: the system's reason for files and memory, else a request to report it."""
    if isinstance(error, OSError) and error.strerror:
        name = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{name}. PRECAST_DEBUG=1 shows where."
    if isinstance(error, MemoryError):
        return "There is not enough memory. PRECAST_DEBUG=1 shows where."
    said = " ".join(str(error).split())
    return (
        f"{type(error).__name__}{said and f': {said[:_MAX_CHARACTERS]}'} — a fault of precast or of a library below "
        f"it. PRECAST_DEBUG=1 shows where; please report it with that."
    )


_MAX_CHARACTERS = 500
"""Characters of a foreign message: some hold a whole graph."""


def _escape_unencodable(stream: Any) -> None:
    """Make a stream escape the characters that its encoding lacks, as standard error does."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _check_words(words: list[str]) -> None:
    """Raise click.UsageError for arguments that are not UTF-8: Python passes such bytes on as halves of characters."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"The argument {word!a} is not UTF-8 text.") from None


@contextmanager
def _only_our_warnings() -> Iterator[None]:
    """Print precast's own warnings as a line each, and drop those of libraries.

    The libraries below read from the environment how much to log and whether to draw bars; what the user has set there
    stays.
    """
    from precast.runtime.errors import PrecastWarning

    if _is_debugged():
        yield
        return
    for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.stderr.isatty() or {"-q", "--quiet"} & {*sys.argv[1:]}:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PrecastWarning)
        warnings.showwarning = lambda message, *_, **__: note(f"precast: {message}")
        yield


def _raise_again(lost: Any) -> bool:
    """Send an interrupt again that Python dropped because it arrived during garbage collection."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is not None:
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    return number is not None


def print_json(value: Any) -> None:
    """Print the one JSON document of a `--json` call; characters that the encoding lacks are escaped."""
    click.echo(json_text(value, indent=2))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that is safe to show on a terminal, on several lines if indented."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return escaped_json(json.dumps(value, ensure_ascii=not is_utf8, indent=indent))


def echo(text: str) -> None:
    """Print lines of the result, with control characters escaped."""
    click.echo(printable(text))


def echo_answer(piece: str) -> None:
    """Print a piece of a model's answer at once: escaped on a terminal, as it is into a file or a pipe."""
    # click would leave out the colours that a model may have been asked for.
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a line for people on standard error."""
    click.echo(printable(text), err=True)


def step_reporter(quiet: bool) -> Callable[[str], AbstractContextManager[Progress]]:
    """Show each step with its time: a bar on a terminal, a line when done; nothing if `quiet`. A step yields a function
    that takes how much is done, and of how much."""

    @contextmanager
    def step(name: str) -> Iterator[Progress]:
        if quiet:
            yield _no_progress
            return
        started = time.perf_counter()
        with bar(name) as progress:
            yield progress
        note(f"  {name:<10} {time.perf_counter() - started:6.1f} s")

    return step


def _no_progress(done: int, total: int, what: str = "") -> None:
    pass


@contextmanager
def bar(name: str) -> Iterator[Progress]:
    """Show a step's bar on a terminal while it runs."""
    if not sys.stderr.isatty():
        yield _no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task, started = shown.add_task(name, total=None), time.perf_counter()

        def progress(done: int, total: int, what: str = "") -> None:
            said = describe_progress(name, done, total, what, time.perf_counter() - started)
            shown.update(task, description=said, completed=done, total=total)

        yield progress


def describe_progress(name: str, done: int, total: int, what: str, seconds: float) -> str:
    """The progress of a step that has run for `seconds`, with an estimate of the rest once that is long enough."""
    left = seconds * (total - done) / done if done else 0.0
    time_left = f", about {left:.0f} s left" if seconds > _ESTIMATE_AFTER and left >= 1 else ""
    return f"{name}{what and f': {what}'} ({min(done + 1, total)} of {total}{time_left})"


_ESTIMATE_AFTER = 2.0
"""Seconds after which the rest is estimated."""


def _print_error(message: str, kind: str) -> None:
    message = " ".join(message.splitlines())
    if _wants_json():
        # Standard output may be the very thing that failed: no room is left, nobody reads it.
        with suppress(OSError):
            print_json({"error": {"type": kind, "message": message}})
    note(f"precast: {message}")


def _wants_json() -> bool:
    """Whether --json was given: read from the arguments, since parsing them may be what failed."""
    return "--json" in sys.argv[1:]
