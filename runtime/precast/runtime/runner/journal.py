"""Answers on their way into a file: kept batch by batch, and put in order at the end.

Beside OUT lies OUT.partial while the work goes on: a line that says what the work is, then a line for each row, and an
empty line after each batch. What a kill cut short is no whole batch, so whoever goes on computes exactly the batches
that are missing. At the end the rows are written in their order to another file, which takes the name OUT.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import PublishError, UsageError
from .outputs import json_line, writer_of

__all__ = ["Journal"]

_END_OF_BATCH = b"\n\n"
_TRIES = 10


class Journal:
    """The answers to a file's rows, by their index.

    Args:
        target: the file to make.
        work: what the work is, by parts that may differ from those of an interrupted run: {"model": …, "input": …}.
        resume: go on where an interrupted run stopped; begin where there is none.
        force: replace the file and what an interrupted run left.

    Attributes:
        work: what the work is; of an interrupted run what that was begun with.
        is_complete: the file is there and no run was interrupted; nothing can be added.

    Raises:
        UsageError: the file is there, or an interrupted run of other work; another process writes it; its format is
            unknown.
        PublishError: it cannot be written.
    """

    def __init__(self, target: Path, work: Mapping[str, Any], *, resume: bool = False, force: bool = False) -> None:
        if resume and force:
            raise UsageError("resume=True goes on with what is there, and force=True replaces it; pass one of them.")
        if target.is_dir():
            raise UsageError(f"{target} is a directory; name a file to write.")
        self._target, self._write = target, writer_of(target)
        self._partial = target.with_name(f"{target.name}.partial")
        self._places: dict[int, tuple[int, int]] = {}
        self.work, self.is_complete = dict(work), False
        self._is_empty = False
        with _telling(target):
            self._file = _open_locked(self._partial, target)
        try:
            self._begin(resume, force)
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> set[int]:
        """The rows that have been answered."""
        return set(self._places)

    def add(self, batch: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Keep the answers of a batch, by the indices of its rows. Raises PublishError where there is no room."""
        with _telling(self._target, len(self._places)):
            self._append([json_line([index, row]) for index, row in batch], [index for index, _ in batch])
        self._is_empty = False

    def rows(self) -> Iterator[dict[str, Any]]:
        """All answers in the order of their rows."""
        for index in sorted(self._places):
            start, size = self._places[index]
            yield json.loads(os.pread(self._file, size, start))[1]

    def finish(self) -> None:
        """Write the file from what was kept. Raises PublishError where it cannot be written, which loses nothing."""
        beside = self._target.with_name(f"{self._target.name}.writing")
        with _telling(self._target, len(self._places)):
            try:
                with beside.open("wb") as file:
                    self._write(file, self.rows())
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self._target)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            self._partial.unlink(missing_ok=True)
            self._is_empty = False

    def close(self) -> None:
        """Leave the work as it is; a later run may go on with it. Where it has no answer yet, nothing is left."""
        if self._file >= 0:
            if self._is_empty:
                self._partial.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _begin(self, resume: bool, force: bool) -> None:
        held = b"" if force else _whole_batches(self._file)
        # A line for each row and one after each batch; the first batch says what the work is.
        rows = max(0, held.count(b"\n") - held.count(_END_OF_BATCH) - 1)
        held = held if rows else b""
        if not held and self._target.exists() and not force:
            self._partial.unlink(missing_ok=True)
            if not resume:
                raise UsageError(f"{self._target} exists already. Pass force=True to replace it, or name another file.")
            self.is_complete = True
            return
        if held and not resume:
            raise UsageError(
                f"An interrupted run left {rows} rows in {self._partial}. Pass resume=True to go on with it, or "
                f"force=True to begin anew."
            )
        with _telling(self._target):
            os.ftruncate(self._file, len(held))
            self._size = len(held)
            if held:
                self._take_over(held)
            else:
                self._append([json_line(self.work)], [])
                self._is_empty = True

    def _take_over(self, held: bytes) -> None:
        """Go on with the batches of an interrupted run. Raises UsageError where that was other work."""
        header, *lines = held.split(b"\n")
        begun = json.loads(header)
        if other := [name for name in self.work if name != "seed" and begun.get(name) != self.work[name]]:
            raise UsageError(
                f"{self._partial} was begun with another {' and another '.join(other)}. Run it as before to go on, or "
                f"pass force=True to begin anew."
            )
        self.work, start = begun, len(header) + 1
        for line in lines:
            if line:
                self._places[json.loads(line)[0]] = start, len(line)
            start += len(line) + 1

    def _append(self, lines: list[bytes], indices: list[int]) -> None:
        start = self._size
        data = b"\n".join(lines) + _END_OF_BATCH
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], start + written)
        except OSError:
            # The next run finds whole batches only.
            with suppress(OSError):
                os.ftruncate(self._file, start)
            raise
        self._size += len(data)
        for index, line in zip(indices, lines, strict=False):
            self._places[index] = start, len(line)
            start += len(line) + 1


def _whole_batches(descriptor: int) -> bytes:
    """What a run left, up to the end of its last whole batch."""
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    end = data.rfind(_END_OF_BATCH)
    return data[: end + len(_END_OF_BATCH)] if end >= 0 else b""


def _open_locked(path: Path, target: Path) -> int:
    """Open a file that no other process has open in this way. Raises UsageError where one has."""
    for _ in range(_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(f"Another process is writing {target}. Wait for it, or name another file.") from None
        except OSError:
            # A file system without locks: two processes on one file are the user's own affair there.
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        # The other process finished, and removed the file, between the two steps.
        os.close(descriptor)
    raise UsageError(f"Another process is writing {target}. Wait for it, or name another file.")


@contextmanager
def _telling(target: Path, kept: int = 0) -> Iterator[None]:
    """Raise PublishError for what the system refuses; `kept` rows are there to go on with."""
    try:
        yield
    except OSError as error:
        rest = f" {kept} rows are kept; resume=True goes on with them." if kept else ""
        raise PublishError(f"{target} cannot be written: {error.strerror}.{rest}") from error
