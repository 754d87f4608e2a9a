"""Locked directories for work in progress, so that later processes can tell and remove what a killed one left.

The lock ends with the process, however that ends, and another container on the same disk sees it, too, where process
ids would mean nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

__all__ = ["LockedDirectory", "Scratch", "old_ones", "sweep"]

STALE_SECONDS = 24 * 3600
"""Where the file system has no locks, a directory that nobody wrote to for so long counts as left behind."""
_TRIES = 100


class LockedDirectory:
    """A new directory, locked.

    Attributes:
        path: where it is.
        is_locked: False where the file system has no locks.
    """

    def __init__(self, parent: Path, prefix: str, mode: int = 0o777) -> None:
        """Raises OSError where none can be made."""
        for _ in range(_TRIES):
            self.path = parent / f"{prefix}{secrets.token_hex(8)}"
            self.path.mkdir(mode=mode)
            with suppress(BlockingIOError, FileNotFoundError):
                self._lock = _lock_new(self.path)
                return
            # Another process swept the directory between the two steps, before it was locked.
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self.path))

    @property
    def is_locked(self) -> bool:
        return self._lock is not None

    def close(self) -> None:
        """Delete what lies there, and unlock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Unlock, and leave what lies there, until somebody sweeps it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Scratch(LockedDirectory):
    """A directory for temporary files; those that killed processes of this user left are deleted first.

    Entering it gives its path; leaving deletes it.
    """

    PREFIX = "precast-scratch-"

    def __init__(self) -> None:
        """Raises OSError where none can be made."""
        parent = Path(tempfile.gettempdir())
        sweep(parent.glob(f"{self.PREFIX}*"))
        super().__init__(parent, self.PREFIX, 0o700)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *details: object) -> None:
        self.close()


def old_ones(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of these directories in which nothing was written for STALE_SECONDS."""
    for path in paths:
        with suppress(OSError):
            if time.time() - _last_written(path) > STALE_SECONDS:
                yield path


def sweep(paths: Iterable[Path]) -> None:
    """Delete the directories of this user that no process holds."""
    for path in paths:
        with suppress(OSError):
            if path.lstat().st_uid != os.geteuid():
                continue
            lock = _lock(path)
            if lock is None and time.time() - _last_written(path) < STALE_SECONDS:
                continue
            shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _lock_new(path: Path) -> int | None:
    lock = _lock(path)
    if lock is not None and not _is_at(path, lock):
        os.close(lock)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return lock


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(path: Path) -> int | None:
    """Lock a directory for as long as the result is open; None where the file system has no locks.

    Raises BlockingIOError where someone else holds it, OSError where it is no directory.
    """
    with ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return None
        stack.pop_all()
        return descriptor


def _last_written(path: Path) -> float:
    return max(found.lstat().st_mtime for found in (path, *path.rglob("*")))
