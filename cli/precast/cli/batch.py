"""Many rows at once: the options of `generate` and `predict` for files, and how such a file is answered."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .inputs import note_blank_lines
from .output import echo, json_text, print_json

if TYPE_CHECKING:
    from precast.runtime.runner.batches import Worker
    from precast.runtime.runner.rows import Row

__all__ = ["Files", "answer", "file_options", "read_input"]

F = TypeVar("F", bound=Callable[..., Any])
_FORMATS = ("txt", "jsonl", "json", "csv", "tsv", "parquet")


@dataclass(frozen=True)
class Files:
    """What the options for files say; see `file_options`."""

    input_file: Path | None
    input_format: str | None
    column: str | None
    keep_blank_lines: bool
    line_breaks: bool
    output_file: Path | None
    resume: bool
    force: bool
    fail_fast: bool
    replicas: int
    ray: str | None
    ray_cpus: int

    @classmethod
    def pop(cls, options: dict[str, Any], *, may_force: bool = False) -> Files:
        """Take these options out of a command's; `may_force` where --force is of another file, too. Raises
        click.UsageError for some that mean nothing without others."""
        files = cls(**{name: options.pop(name) for name in cls.__dataclass_fields__})
        if files.output_file is None and (files.resume or (files.force and not may_force)):
            raise click.UsageError("--resume and --force are of an output file; give --output-file.")
        if files.output_file is None and files.replicas > 1:
            raise click.UsageError("--replicas answer the rows of an output file; give --output-file.")
        if files.output_file is None and files.ray is not None:
            raise click.UsageError("--ray answers the rows of an output file; give --output-file.")
        return files

    @property
    def is_streamed(self) -> bool:
        """Whether lines of standard input are answered as they come."""
        reads_input = self.input_file is None or str(self.input_file) == "-"
        return reads_input and self.output_file is None and self.input_format in (None, "txt") and not self.column


def file_options(*aliases: str) -> Callable[[F], F]:
    """The options for files of rows; `aliases` are other names of --input-file."""

    def decorate(function: F) -> F:
        path = click.Path(path_type=Path, dir_okay=False)
        for option in reversed(
            [
                click.option("--input-file", *aliases, "input_file", metavar="FILE",
                             type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
                             help="Many rows: a text on each line, or JSON lines, JSON, CSV, Parquet by its suffix; "
                             "'-' is standard input."),
                click.option("--input-format", type=click.Choice(_FORMATS), help="If its suffix does not say it."),
                click.option("--column", metavar="NAME",
                             help="What to ask of rows with columns; else prompt, text or messages."),
                click.option("--keep-blank-lines", is_flag=True, help="Blank lines of a text file are rows, too."),
                click.option("--line-breaks", is_flag=True, help="In a text file, \\n within a line is a line break."),
                click.option("--output-file", metavar="FILE", type=path,
                             help="Write the answers there, in the order of the rows: .jsonl, .json, or .txt to read."),
                click.option("--resume", is_flag=True,
                             help="Go on with an output file that was interrupted; begin where there is none."),
                click.option("--force", is_flag=True, help="Replace a file that is there."),
                click.option("--fail-fast", is_flag=True,
                             help="End at the first row that cannot be answered, instead of noting its reason."),
                click.option("--replicas", type=click.IntRange(min=1), default=1, metavar="N",
                             help="Answer an output file's rows in N processes, each with its share of the cores."),
                click.option("--ray", metavar="ADDRESS",
                             help="Answer an output file's rows on the nodes of this Ray cluster: auto, local, "
                             "HOST:PORT. Needs precast[ray]."),
                click.option("--ray-cpus", type=click.IntRange(min=1), default=1, metavar="N",
                             help="With --ray: CPUs, and threads, of each actor; as many actors as there is room for."),
            ]
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


def read_input(files: Files, texts: Sequence[str] = ()) -> list[Row]:
    """The rows of `texts` and of the input file or standard input. Raises UsageError where there are none."""
    from precast.runtime.runner.rows import Row, parse_rows, read_rows

    given = [Row(text) for text in texts]
    if files.input_file is None:
        return given
    name = str(files.input_file)
    how: dict[str, Any] = {
        "keep_blank": files.keep_blank_lines, "line_breaks": files.line_breaks,
        "skipped": lambda lines: note_blank_lines(lines, "Standard input" if name == "-" else name),
    }  # fmt: skip
    if name == "-":
        return given + parse_rows(sys.stdin.buffer.read(), "Standard input", files.input_format or "txt", **how)
    return given + read_rows(files.input_file, files.input_format, **how)


def answer(
    rows: Sequence[Row], files: Files, work: dict[str, Any], make_worker: Callable[[int | None], Worker], *,
    as_json: bool, quiet: bool, told: Callable[[], str] = lambda: "",
) -> None:  # fmt: skip
    """Answer rows into the output file, or print the answers; `told` says more of them for the last line.

    Ends the command with status 1 where none could be answered.
    """
    if files.output_file is None:
        failed = _print_answers(rows, make_worker(work.get("seed")), files.fail_fast, as_json)
    else:
        failed = _write_answers(rows, files, work, make_worker, as_json, quiet, told)
    if failed == len(rows):
        raise click.exceptions.Exit(1)


def _print_answers(rows: Sequence[Row], worker: Worker, fail_fast: bool, as_json: bool) -> int:
    """Print the answers in the order of the rows, each as soon as those before it are there; how many failed."""
    from precast.runtime.runner.batches import Answers, answer_rows

    waiting: dict[int, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []

    def add(answers: Answers) -> None:
        waiting.update(answers)
        while (row := waiting.pop(len(found), None)) is not None:
            found.append(row)
            if not as_json:
                click.echo(json_text(row))

    answer_rows(rows, worker, add, fail_fast=fail_fast)
    if as_json:
        print_json(found)
    return sum("error" in row for row in found)


def _write_answers(
    rows: Sequence[Row], files: Files, work: dict[str, Any], make_worker: Callable[[int | None], Worker],
    as_json: bool, quiet: bool, told: Callable[[], str],
) -> int:  # fmt: skip
    from precast.runtime.runner.files import answer_file

    assert files.output_file is not None, "the caller has seen to it"
    with _row_bar(len(rows), quiet) as advance:
        summary = answer_file(
            rows, files.output_file, work, make_worker, resume=files.resume, force=files.force,
            fail_fast=files.fail_fast, replicas=files.replicas, ray=files.ray, ray_cpus=files.ray_cpus, advance=advance,
        )  # fmt: skip
    if as_json:
        print_json({"path": str(files.output_file), **summary.to_json()})
    else:
        echo(f"{files.output_file}: {_describe(summary.to_json())}{told()}")
    return summary.failed


def _describe(summary: dict[str, Any]) -> str:
    rows, computed, failed = summary["rows"], summary["computed"], summary["failed"]
    speed = f", {summary['rows_per_second']:g} rows/s" if summary["rows_per_second"] else ""
    earlier = f", {rows - computed} of them from before" if computed < rows else ""
    return (
        f"{rows} row{'' if rows == 1 else 's'} in {summary['seconds']:.1f} s{speed}{earlier}"
        + (f"; {failed} failed, with the reason in its row" if failed == 1 else "")
        + (f"; {failed} failed, with the reasons in their rows" if failed > 1 else "")
    )


@contextmanager
def _row_bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of rows on a terminal, with rows per second and the time left."""
    if quiet or not sys.stderr.isatty():
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]}")
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=total, speed="")

        def advance(rows: int) -> None:
            bar.update(task, advance=rows)
            found = bar.tasks[0].speed
            bar.update(task, speed=f"{found:.1f} rows/s" if found else "")

        yield advance
