"""Progress of long steps, told to whoever listens, so that what they call needs no argument for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

__all__ = ["OnStep", "Progress", "no_progress", "prefixed", "progress", "progress_to"]

OnStep: TypeAlias = Callable[[str], AbstractContextManager[Any]]
"""Called with the name of each step of an export; what it returns is entered for as long as the step takes. Where that
gives a function, it is the step's `Progress`."""


class Progress(Protocol):
    """Told how many parts of a step are done, of how many, and what is done now."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


def no_progress(done: int, total: int, what: str = "") -> None:
    """A `Progress` that shows nothing."""


_listener: ContextVar[Progress] = ContextVar("listener", default=no_progress)


@contextmanager
def progress_to(listener: Progress | None) -> Iterator[None]:
    """Within this block `progress` tells this listener, if there is one."""
    token = _listener.set(listener or no_progress)
    try:
        yield
    finally:
        _listener.reset(token)


def progress(done: int, total: int, what: str = "") -> None:
    """Say that `done` of `total` parts are done, and what comes now."""
    _listener.get()(done, total, what)


def prefixed(on_step: OnStep, name: str) -> OnStep:
    """The same, with `name` before the name of each step."""

    def step(what: str) -> AbstractContextManager[Any]:
        return on_step(f"{name}: {what}")

    return step
