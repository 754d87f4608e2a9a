"""Rows of input files: lines, JSON, CSV and Parquet, each as it was found, and what is to be asked of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError

__all__ = ["FORMATS", "Column", "Row", "as_conversation", "format_of", "parse_rows", "read_rows"]

FORMATS = ("txt", "jsonl", "json", "csv", "tsv", "parquet")


@dataclass(frozen=True)
class Row:
    """A row of an input file.

    Attributes:
        given: a line's text, or the value of a JSON row; None where it cannot be read.
        problem: why it cannot be read.
    """

    given: Any
    problem: str | None = None


def read_rows(
    path: Path, format_: str | None = None, *, keep_blank: bool = False, line_breaks: bool = False,
    skipped: Callable[[list[int]], None] = lambda lines: None,
) -> list[Row]:  # fmt: skip
    """The rows of a file, as `parse_rows`. Raises UsageError where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    named = format_ or format_of(path)
    return parse_rows(data, str(path), named, keep_blank=keep_blank, line_breaks=line_breaks, skipped=skipped)


def format_of(path: Path) -> str:
    """The format by a file's name; whatever is not known is read as lines."""
    suffix = path.suffix.lower().removeprefix(".")
    return {"ndjson": "jsonl"}.get(suffix, suffix if suffix in FORMATS else "txt")


def parse_rows(
    data: bytes, name: str, format_: str, *, keep_blank: bool = False, line_breaks: bool = False,
    skipped: Callable[[list[int]], None] = lambda lines: None,
) -> list[Row]:  # fmt: skip
    """The rows in `data`, which messages call `name`.

    A row of a table or of JSON lines that cannot be read is a row with a problem, so that all others are answered.

    Args:
        format_: one of FORMATS.
        keep_blank: whether blank lines of a txt file are rows.
        line_breaks: whether a backslash and an n in a line of a txt file is a line break.
        skipped: told the numbers of blank lines that are left out.

    Raises:
        UsageError: there are no rows, or the whole file is not what its format says.
    """
    if format_ not in FORMATS:
        raise UsageError(f"There is no format {format_!r}; there are: {', '.join(FORMATS)}.")
    if format_ == "parquet":
        rows = _parse_parquet(data, name)
    elif format_ in ("csv", "tsv"):
        rows = list(_parse_table(_decode(data, name), name, "," if format_ == "csv" else "\t"))
    elif format_ == "json" and data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows = _parse_document(_decode(data, name), name)
    elif format_ == "txt":
        rows = list(_parse_text(_decode(data, name), keep_blank, line_breaks, skipped))
    else:
        rows = list(_parse_lines(data))
    if not rows:
        raise UsageError(f"{name} holds no rows.")
    return rows


def _decode(data: bytes, name: str) -> str:
    try:
        # Editors on Windows begin files with a mark that is no part of the text.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name} is not UTF-8 text: line {line} has the byte {data[error.start]:#04x}.") from error


def _parse_text(text: str, keep_blank: bool, line_breaks: bool, skipped: Callable[[list[int]], None]) -> Iterator[Row]:
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    for line in lines:
        if keep_blank or line.strip():
            text = line.removesuffix("\r")
            yield Row(text.replace("\\n", "\n") if line_breaks else text)
    if blank and not keep_blank:
        skipped(blank)


def _parse_lines(data: bytes) -> Iterator[Row]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield Row(json.loads(line.decode()))
        except UnicodeDecodeError as error:
            yield Row(None, f"Line {number} is not UTF-8 text: it has the byte {line[error.start]:#04x}.")
        except json.JSONDecodeError as error:
            yield Row(None, f"Line {number} is not JSON: {error.msg} at character {error.colno}.")
        except (RecursionError, ValueError) as error:
            yield Row(None, f"Line {number} is not JSON that can be read: {error}.")


def _parse_document(text: str, name: str) -> list[Row]:
    try:
        return [Row(each) for each in json.loads(text)]
    except json.JSONDecodeError as error:
        raise UsageError(f"{name} is not JSON: {error.msg} in line {error.lineno}.") from error
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{name} is not JSON that can be read: {error}.") from error


def _parse_table(text: str, name: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = cells
                if doubled := next((cell for cell in cells if cells.count(cell) > 1), None):
                    raise UsageError(f"{name} has two columns {doubled!r}; rename one.")
            elif len(cells) == len(header):
                yield Row(dict(zip(header, cells, strict=True)))
            elif cells:
                count = f"{len(cells)} {'value' if len(cells) == 1 else 'values'}"
                yield Row(None, f"Line {reader.line_num} has {count}, and there are {len(header)} columns.")
    except csv.Error as error:
        raise UsageError(f"{name} is no table that can be read: {error} in line {reader.line_num}.") from error


def _parse_parquet(data: bytes, name: str) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{name}: reading Parquet takes pyarrow. Install it: pip install 'precast[files]'") from None
    try:
        return [Row(each) for each in pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{name} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error


class Column:
    """Which column of a file's rows is asked; without a name the first of `usual` that a row has.

    Attributes:
        names: in this order.

    Raises:
        UsageError: no row has it.
    """

    def __init__(self, rows: Iterable[Row], name: str | None, usual: Sequence[str]) -> None:
        self.names = [name] if name is not None else list(usual)
        tables = [row.given for row in rows if isinstance(row.given, dict)]
        found = list(dict.fromkeys(key for given in tables for key in given))
        if name is not None and not tables:
            raise UsageError(f"column={name!r} is for rows with columns; these are texts.")
        if not tables or any(each in found for each in self.names):
            return
        listed = ", ".join(map(str, found)) or "none"
        if name is not None:
            near = "".join(f" Did you mean {each}?" for each in get_close_matches(name, map(str, found), n=1))
            raise UsageError(f"There is no column {name!r}.{near} The columns are: {listed}.")
        raise UsageError(
            f"The rows have none of the columns {', '.join(usual)}; theirs are: {listed}. Choose one by column=NAME."
        )

    @classmethod
    def of_names(cls, names: Sequence[str]) -> Column:
        """The column that was found by these names in rows that are elsewhere."""
        return cls([], None, names)

    def value(self, row: Row) -> Any:
        """What is asked of a row. Raises InputError where it cannot be read or lacks the column."""
        if row.problem is not None:
            raise InputError(row.problem)
        if not isinstance(row.given, dict):
            return row.given
        for name in self.names:
            if name in row.given:
                return row.given[name]
        raise InputError(
            f"The row has no column {' or '.join(self.names)}; it has: {', '.join(map(str, row.given)) or 'none'}."
        )


def as_conversation(given: Any, value: Any) -> list[dict[str, Any]] | None:
    """The messages of a row: those that `value` is, or the rounds of a chat, the user's in a list `src` and the
    answers before the last in `tgt`; None for a text. Raises InputError for anything else."""
    if isinstance(value, str):
        return None
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        return value
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        said = given.get("tgt") if isinstance(given, dict) else None
        answers = said if isinstance(said, list) else [said] if isinstance(said, str) else []
        if len(answers) < len(value) - 1:
            raise InputError(f"The row has {len(value)} rounds of a chat and {len(answers)} answers to them.")
        turns = [("user", each) for each in value]
        mixed = [turn for pair in zip(turns, (("assistant", each) for each in answers), strict=False) for turn in pair]
        told = mixed[: 2 * (len(value) - 1)] + turns[-1:]
        return [{"role": role, "content": content} for role, content in told]
    raise InputError(f'A prompt is a text, or messages [{{"role": …, "content": …}}]; this is {value!r:.80}.')
