"""Refuse unknown keyword arguments, with the nearest known ones."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from .errors import UsageError

__all__ = ["only_known", "refuse_unknown"]

P = ParamSpec("P")
R = TypeVar("R")


def refuse_unknown(call: str, given: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    """Raise UsageError where some of the names `given` are not `known`; `hint` says what else might be meant."""
    names = list(known)
    if unknown := [name for name in given if name not in names]:
        nearest = dict.fromkeys(near for name in unknown for near in difflib.get_close_matches(name, names, n=1))
        guess = f" Did you mean {', '.join(nearest)}?" if nearest else ""
        raise UsageError(
            f"{call} does not know {', '.join(unknown)}.{guess}{hint} Its options are: {', '.join(names) or 'none'}."
        )


def only_known(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse unknown keywords by `refuse_unknown`, where Python would raise a TypeError."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    name = "This call" if function.__name__ == "__call__" else f"{function.__name__}()"

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_unknown(name, kwargs, known)
        return function(*args, **kwargs)

    return checked
