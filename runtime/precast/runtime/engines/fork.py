"""Refuse models in forked children, where their threads and connections to devices are gone and a call would hang."""

from __future__ import annotations

import os

from ..errors import UsageError

__all__ = ["ForkGuard"]


class ForkGuard:
    """Remembers the process that opened a model, and refuses calls in its forks.

    Args:
        held: what a fork loses, as errors call it: "the 2 threads"; empty if nothing.
        pid: the process; by default the current one.
    """

    def __init__(self, held: str, pid: int | None = None) -> None:
        self._held, self._pid = held, pid or os.getpid()

    @classmethod
    def of_threads(cls, count: int, pid: int | None = None) -> ForkGuard:
        """A guard of `count` threads, the caller's among them."""
        return cls(f"the {count} threads that run this model" if count > 1 else "", pid)

    def check(self) -> None:
        """Raise UsageError in a fork of the process."""
        if self._held and (pid := os.getpid()) != self._pid:
            raise UsageError(
                f"Process {pid} is a fork of process {self._pid}, where {self._held} stayed behind. Start children "
                f'with multiprocessing.get_context("spawn") and load the model in each; on the CPU, a model loaded '
                f"with threads=1 runs in forks, too."
            )
