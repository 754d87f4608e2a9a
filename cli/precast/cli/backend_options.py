"""The options of single backends on the command line, made of the classes that the backends' rows name."""

from __future__ import annotations

from dataclasses import Field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import click

from precast.runtime.artifact.backends import Backend, backend_rows

from .options import LENGTHS, InSection, Sections

__all__ = ["ExportCommand"]


class ExportCommand(Sections):
    """A command that has the options of every backend, those of plug-ins included."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """See click.Command; backends are looked up now, when a command is run or asked for its help."""
        return [*super().get_params(ctx), *_backend_params()]


def _backend_params() -> list[click.Parameter]:
    """One parameter per option; of several backends' options of one name the first counts."""
    found: dict[str, click.Parameter] = {}
    for row in backend_rows():
        for param in _params_of(row):
            found.setdefault(str(param.name), param)
    return list(found.values())


@cache
def _params_of(row: Backend) -> list[click.Parameter]:
    """The same objects at each call: click tells parameters by identity."""
    from precast.exporter.options.backend_options import options_class

    kind = options_class(row)
    types = get_type_hints(kind)
    return [_param(each, types[each.name], f"With --backend {row.name}") for each in fields(kind)]


def _param(each: Field[Any], hint: Any, section: str) -> click.Parameter:
    """An option of the type that the field is annotated with; a default that is a word is shown."""
    from precast.exporter.options.declaration import flag_of

    said = each.metadata
    flags = said.get("flags") or (flag_of(each.name),)
    if hint is bool:
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
    return InSection(
        [*flags, each.name],
        default=each.default,
        show_default=isinstance(each.default, str) and bool(each.default),
        metavar=said.get("metavar"),
        help=said.get("help", ""),
        section=said.get("section") or section,
        **_type_of(hint),
    )


def _type_of(hint: Any) -> dict[str, Any]:
    """How click reads a value: `int | None`, `Path`, `bool`; `tuple[str, ...]` from a flag that is repeated."""
    if hint is bool:
        return {}
    if get_origin(hint) is tuple:
        first = get_args(hint)[0]
        return {"type": LENGTHS} if first is int else {"type": first, "multiple": True}
    (plain,) = [each for each in get_args(hint) or (hint,) if each is not NoneType]
    return {"type": click.Path(path_type=Path) if plain is Path else plain}
