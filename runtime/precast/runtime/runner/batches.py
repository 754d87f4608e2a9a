"""Rows in batches: formed by length, so that little is padded, and each answered whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ..errors import InputError, OutOfMemoryError
from .rows import Row

__all__ = ["Answers", "Asker", "Portable", "Prepared", "Worker", "answer_batch", "answer_here", "answer_rows",
           "error_row", "input_of", "plan_batches"]  # fmt: skip

Answers = list[tuple[int, dict[str, Any]]]
"""The answers of a batch, by the indices of its rows."""


@dataclass(frozen=True)
class Prepared:
    """A row that is ready to be asked.

    Attributes:
        index: of the row in its file.
        row: as it was found.
        value: what the worker asks.
        length: rows of a like length are asked together.
        group: only rows of one group are asked together: their answers may be equally long, say.
    """

    index: int
    row: Row
    value: Any
    length: int = 0
    group: int = 0


class Worker(Protocol):
    """What answers rows.

    Attributes:
        batch_size: how many it answers at once.
    """

    batch_size: int

    def prepare(self, index: int, row: Row) -> Prepared:
        """A row made ready. Raises InputError where it cannot be asked."""

    def answer(self, batch: Sequence[Prepared]) -> list[dict[str, Any]]:
        """The answers of a batch, a JSON object for each row. Raises InputError."""


@runtime_checkable
class Portable(Protocol):
    """A worker that another process can make, too."""

    def as_job(self, asked: str) -> dict[str, Any]:
        """What `jobs.open_job` makes the same worker of, as JSON; messages name what it is for as `asked`. Raises
        UsageError where no other process can have the same."""


Asker: TypeAlias = Callable[[Sequence[list[Prepared]], Worker, bool], Generator[Answers, None, None]]
"""Yields the answers of batches in any order; the last argument is `fail_fast`, as of `answer_rows`."""


def answer_here(batches: Sequence[list[Prepared]], worker: Worker, fail_fast: bool) -> Generator[Answers, None, None]:
    """Answer batches in this process, one after the other."""
    for batch in batches:
        yield answer_batch(batch, worker, fail_fast)


def plan_batches(prepared: Iterable[Prepared], size: int) -> list[list[Prepared]]:
    """Rows in batches of `size`, each of one group and of like lengths.

    It depends on nothing but the rows: a run that goes on after a kill forms the same batches, in which alone a row's
    numbers are the same to the last bit.
    """
    ordered = sorted(prepared, key=lambda each: (each.group, each.length, each.index))
    return [
        rows[start : start + size]
        for _, found in groupby(ordered, key=lambda each: each.group)
        for rows in [list(found)]
        for start in range(0, len(rows), size)
    ]


def answer_rows(
    rows: Sequence[Row], worker: Worker, add: Callable[[Answers], None], *, done: Collection[int] = (),
    fail_fast: bool = False, ask: Asker = answer_here,
) -> None:  # fmt: skip
    """Answer all rows but those that are `done`, and give each batch's answers to `add`. A row that cannot be answered
    gets its reason instead: {"input", "error": {"type", "message"}}. Who answers a batch is up to `ask`.

    Raises InputError for the first such row with `fail_fast`.
    """
    prepared: list[Prepared] = []
    failed: Answers = []
    for index, row in enumerate(rows):
        try:
            prepared.append(worker.prepare(index, row))
        except InputError as error:
            failed.append((index, _failed(index, row, error, fail_fast)))
    batches = plan_batches(prepared, worker.batch_size)
    if left := [each for each in failed if each[0] not in done]:
        add(left)
    missing = [batch for batch in batches if any(each.index not in done for each in batch)]
    with closing(ask(missing, worker, fail_fast)) as found:
        for answers in found:
            add(answers)


def input_of(row: Row) -> dict[str, Any]:
    """What an answer repeats of its row: {"input"}, or the `src` and `tgt` of PaddleNLP's files."""
    if isinstance(row.given, dict) and "src" in row.given:
        return {name: row.given[name] for name in ("src", "tgt") if name in row.given}
    return {"input": row.given}


def error_row(row: Row, error: Exception) -> dict[str, Any]:
    """The answer of a row that could not be answered."""
    return {**input_of(row), "error": {"type": type(error).__name__, "message": str(error)}}


def answer_batch(batch: list[Prepared], worker: Worker, fail_fast: bool) -> Answers:
    """A batch's answers; where it fails, each row's own, so that one bad row is not the end of its neighbours. Raises
    InputError for one with `fail_fast`."""
    try:
        return [(each.index, answer) for each, answer in zip(batch, worker.answer(batch), strict=True)]
    except OutOfMemoryError:
        raise
    except InputError as error:
        if len(batch) == 1:
            return [(batch[0].index, _failed(batch[0].index, batch[0].row, error, fail_fast))]
    return [answer for each in batch for answer in answer_batch([each], worker, fail_fast)]


def _failed(index: int, row: Row, error: InputError, fail_fast: bool) -> dict[str, Any]:
    if fail_fast:
        raise InputError(f"Row {index + 1}: {error}") from error
    return error_row(row, error)
