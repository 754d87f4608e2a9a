"""Long steps say how far they are to whoever listens, so that what they call takes no argument for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

__all__ = ["Tell", "heard_by", "tell", "tell_nobody"]


class Tell(Protocol):
    """Told how many parts of a step are done, of how many, and what is done now."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


def tell_nobody(done: int, total: int, what: str = "") -> None:
    """Listens to nothing."""


_listener: ContextVar[Tell] = ContextVar("listener", default=tell_nobody)


@contextmanager
def heard_by(listener: Tell | None) -> Iterator[None]:
    """What is told within is told to this listener, if there is one."""
    token = _listener.set(listener or tell_nobody)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(done: int, total: int, what: str = "") -> None:
    """Say that `done` of `total` parts are done, and what comes now."""
    _listener.get()(done, total, what)
