"""The options that single backends take: found by the classes that their rows in the table of backends name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import cache
from importlib import import_module
from typing import Any

from precast.runtime.artifact.backends import Backend, backend_rows
from precast.runtime.errors import UsageError

from .declaration import OptionsPart
from .shapes import ShapeOptions

__all__ = ["BackendOptions", "backends_that_take", "fill", "find_option", "options_class", "taken_by", "why_not_taken"]


@dataclass(frozen=True, kw_only=True)
class BackendOptions(OptionsPart):
    """The options of one backend beside those of every export; a backend that has some derives its class from this.

    Each field says by `describe` how the command line has it, too; one whose default is a tuple takes several values.
    A module that holds such a class imports nothing heavy: options are checked before torch is imported.
    """

    def problems(self) -> Iterator[str]:
        """See OptionsPart; choices are checked before, whether this backend is asked for or another."""
        yield from ()

    def variants(self) -> Sequence[BackendOptions]:
        """The options of each variant that these ask for: by default of one, these."""
        return [self]

    def name_parts(self) -> Sequence[str]:
        """What the name of the variant has beside the backend's and that of its precision, where these options tell
        variants apart."""
        return []

    def layout_problems(self, layout: str, shapes: ShapeOptions) -> Iterator[str]:
        """Describe all that a layout which the backend's row takes has no place for, a sentence each."""
        yield from ()


def options_class(row: Backend) -> type[BackendOptions]:
    """The class that the row names. Raises UsageError where it is none of options."""
    return BackendOptions if row.options is None else _load(row.options)


@cache
def _load(path: str) -> type[BackendOptions]:
    module, _, name = path.partition(":")
    found = getattr(import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, BackendOptions)):
        raise UsageError(f"{path} is no class of options: it must be derived from BackendOptions.")
    return found


def taken_by(row: Backend) -> frozenset[str]:
    """The names of the options that not every backend takes, and this one does."""
    return row.takes.union(each.name for each in fields(options_class(row)))


def backends_that_take(name: str) -> str:
    """The names of the backends that take an option, for a message."""
    return ", ".join(row.name for row in backend_rows() if name in taken_by(row)) or "none"


def find_option(name: str) -> Field[Any] | None:
    """The declaration of an option of a backend, the first in the table that has it; plug-ins come last."""
    declared = (each for row in backend_rows() for each in fields(options_class(row)))
    return next((each for each in declared if each.name == name), None)


def why_not_taken(row: Backend, name: str) -> str:
    """Why a backend does not take an option, after a colon."""
    declared = find_option(name)
    return (declared.metadata.get("because") if declared else "") or row.because


def fill(kind: type[BackendOptions], given: Mapping[str, Any]) -> BackendOptions:
    """An instance with those of the given values that are options of the class."""
    return kind(**{each.name: given[each.name] for each in fields(kind) if each.name in given})
