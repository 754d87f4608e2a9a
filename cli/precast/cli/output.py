"""What reaches the terminal: results on standard output, everything else on standard error, errors in one line.

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
    "Progress", "echo", "echo_answer", "json_text", "note", "print_json", "progress_in_words", "run", "step_reporter",
]  # fmt: skip

Progress = Callable[..., None]
"""Told how many parts of a step are done, of how many, and what is done now."""


def run(cli: click.Command) -> None:
    """Run the command line and end the process."""
    from precast.runtime.errors import PrecastError, UsageError

    # Unwinding, rather than dying at once, removes what an export has staged.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report_lost, sys.unraisablehook = sys.unraisablehook, lambda lost: _come_again(lost) or report_lost(lost)
    _write_anything(sys.stdout)
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
        _print_error(_unexpected(error), type(error).__name__)
        sys.exit(1)
    finally:
        sys.unraisablehook = report_lost


def _is_debugged() -> bool:
    return os.environ.get("PRECAST_DEBUG") == "1"


def _unexpected(error: BaseException) -> str:
    """What nobody foresaw, in a line: of files and memory it is the machine's word, all else a fault."""
    if isinstance(error, OSError) and error.strerror:
        name = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{name}. PRECAST_DEBUG=1 shows where."
    if isinstance(error, MemoryError):
        return "There is not enough memory. PRECAST_DEBUG=1 shows where."
    said = " ".join(str(error).split())
    return (
        f"{type(error).__name__}{said and f': {said[:_LONGEST]}'} — a fault of precast or of a library below it. "
        f"PRECAST_DEBUG=1 shows where; please report it with that."
    )


_LONGEST = 500
"""Characters of a foreign message: some hold a whole graph."""


def _write_anything(stream: Any) -> None:
    """Make a stream take what its encoding lacks, as an escape, as standard error does."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _check_words(words: list[str]) -> None:
    """Raise click.UsageError for bytes that are no text: Python hands them on as halves of characters."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"The argument {word!a} is not UTF-8 text.") from None


@contextmanager
def _only_our_warnings() -> Iterator[None]:
    """What precast warns of becomes a line for people; what libraries warn each other of is left out.

    Those below read from the environment how much they are to log and whether to draw bars, where the user may say
    otherwise.
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


def _come_again(lost: Any) -> bool:
    """Python drops an interrupt that arrives while it collects garbage: let the same one arrive a moment later."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is not None:
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    return number is not None


def print_json(value: Any) -> None:
    """The one JSON document of a `--json` call; escapes stand for what a terminal's encoding may lack."""
    click.echo(json_text(value, indent=2))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, of several lines where they are indented, that can be shown."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return escaped_json(json.dumps(value, ensure_ascii=not is_utf8, indent=indent))


def echo(text: str) -> None:
    """Lines of the result, without what a terminal would obey."""
    click.echo(printable(text))


def echo_answer(piece: str) -> None:
    """A part of what a model says, at once. Who reads from a file or a pipe gets it as it is."""
    # click would leave out the colours that a model may have been asked for.
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for people, on standard error."""
    click.echo(printable(text), err=True)


def step_reporter(quiet: bool) -> Callable[[str], AbstractContextManager[Progress]]:
    """Shows each step with its time: a bar on a terminal, a line when done; nothing if `quiet`. A step is given a
    function to tell it how much is done, and of how much."""

    @contextmanager
    def step(name: str) -> Iterator[Progress]:
        if quiet:
            yield _no_progress
            return
        started = time.perf_counter()
        with _bar(name) as progress:
            yield progress
        note(f"  {name:<10} {time.perf_counter() - started:6.1f} s")

    return step


def _no_progress(done: int, total: int, what: str = "") -> None:
    pass


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, started = bar.add_task(name, total=None), time.perf_counter()

        def progress(done: int, total: int, what: str = "") -> None:
            said = progress_in_words(name, done, total, what, time.perf_counter() - started)
            bar.update(task, description=said, completed=done, total=total)

        yield progress


def progress_in_words(name: str, done: int, total: int, what: str, seconds: float) -> str:
    """How far a step is that has taken so long, with an estimate as soon as there is anything to go by."""
    left = seconds * (total - done) / done if done else 0.0
    time_left = f", about {left:.0f} s left" if seconds > _TELLING and left >= 1 else ""
    return f"{name}{what and f': {what}'} ({min(done + 1, total)} of {total}{time_left})"


_TELLING = 2.0
"""Seconds that must have passed before the rest can be guessed from them."""


def _print_error(message: str, kind: str) -> None:
    message = " ".join(message.splitlines())
    if _wants_json():
        # Standard output may be the very thing that failed: no room is left, nobody reads it.
        with suppress(OSError):
            print_json({"error": {"type": kind, "message": message}})
    note(f"precast: {message}")


def _wants_json() -> bool:
    """Whatever went wrong, perhaps the parsing itself, a `--json` call gets its document."""
    return "--json" in sys.argv[1:]
