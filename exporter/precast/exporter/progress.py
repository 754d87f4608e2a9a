"""Report the progress of long steps to a listener in the context, without an argument through every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

__all__ = ["OnStep", "Progress", "no_progress", "prefixed", "progress", "progress_to"]

OnStep: TypeAlias = Callable[[str], AbstractContextManager[Any]]
"""Called with the name of each step of an export; returns a context manager that is entered while the step runs. Where
it yields a function, that is the step's `Progress`."""


class Progress(Protocol):
    """Called with how many parts of a step are done, the total, and the name of the current part."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


def no_progress(done: int, total: int, what: str = "") -> None:
    """A `Progress` that shows nothing."""


_listener: ContextVar[Progress] = ContextVar("listener", default=no_progress)


@contextmanager
def progress_to(listener: Progress | None) -> Iterator[None]:
    """Within this block `progress` calls `listener`, if there is one."""
    token = _listener.set(listener or no_progress)
    try:
        yield
    finally:
        _listener.reset(token)


def progress(done: int, total: int, what: str = "") -> None:
    """Report that `done` of `total` parts are done, and the name of the current one."""
    _listener.get()(done, total, what)


def prefixed(on_step: OnStep, name: str) -> OnStep:
    """`on_step` with `name` before the name of each step."""

    def step(what: str) -> AbstractContextManager[Any]:
        return on_step(f"{name}: {what}")

    return step
