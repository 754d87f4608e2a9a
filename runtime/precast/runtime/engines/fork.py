"""Threads, and connections to devices, do not survive a fork: a child that would wait for them is told so instead."""

from __future__ import annotations

import os

from ..errors import UsageError

__all__ = ["Process"]


class Process:
    """The process in which something is that engines need.

    Args:
        pid: the process.
        held: what is there, as in "the 2 threads"; nothing if all of it survives a fork.
    """

    def __init__(self, held: str, pid: int | None = None) -> None:
        self._held, self._pid = held, pid or os.getpid()

    @classmethod
    def of_threads(cls, count: int, pid: int | None = None) -> Process:
        """Of these threads, the caller's being one of them."""
        return cls(f"the {count} threads that run this model" if count > 1 else "", pid)

    def check(self) -> None:
        """Raise UsageError in a fork of the process."""
        if self._held and (pid := os.getpid()) != self._pid:
            raise UsageError(
                f"Process {pid} is a fork of process {self._pid}, where {self._held} stayed behind. Start children "
                f'with multiprocessing.get_context("spawn") and load the model in each; on the CPU, a model loaded '
                f"with threads=1 runs in forks, too."
            )
