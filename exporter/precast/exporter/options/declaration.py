"""How an option is declared: its default, and in the field's metadata all that is said of it to the user."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import Field, dataclass, fields
from typing import Any

__all__ = ["OptionsPart", "choice_problems", "describe", "flag_of", "keyword_of"]


def describe(
    *,
    choices: Collection[object] = (),
    help_text: str = "",
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    section: str | None = None,
    several: bool = False,
    because: str = "",
) -> dict[str, Any]:
    """The metadata of an option: `isa: str = field(default="native", metadata=describe(choices=ISAS))`.

    Args:
        choices: the values that it can have, besides None; empty for any.
        help_text: a line for the command line.
        flags: how it is typed, the usual spelling first; by default its name with dashes.
        metavar: stands for the value in the help.
        section: of the help; by default that of its backend.
        several: whether it can be several of the choices, separated by commas.
        because: why other backends do not take it, after a colon, where what their rows say is of other options.
    """
    return {
        "choices": choices, "help": help_text, "flags": flags, "metavar": metavar, "section": section,
        "several": several, "because": because,
    }  # fmt: skip


def flag_of(each: Field[Any] | str) -> str:
    """An option as it is typed, by its declaration or its name."""
    if isinstance(each, str):
        return f"--{each.replace('_', '-')}"
    flags: tuple[str, ...] = each.metadata.get("flags", ())
    return flags[0] if flags else flag_of(each.name)


def keyword_of(each: Field[Any] | str) -> str:
    """An option as messages name it, which speak Python: a name of one word has its sign, or it might be English. The
    command line makes flags of them."""
    name = each if isinstance(each, str) else each.name
    return name if "_" in name else f"{name}="


def choice_problems(each: Field[Any], value: object) -> Iterator[str]:
    """Say so where the value is none of the choices that the field declares."""
    choices = each.metadata.get("choices", ())
    values = str(value).split(",") if each.metadata.get("several") else [value]
    for one in values:
        if choices and one is not None and one not in choices:
            yield f"{each.name}={one!r} is not supported; the choices are: {', '.join(map(str, choices))}."


@dataclass(frozen=True, kw_only=True)
class OptionsPart:
    """Options that belong together, all with defaults."""

    def problems(self) -> Iterator[str]:
        """Describe everything that is wrong with these options whatever the others are, a sentence each."""
        for each in fields(self):
            yield from choice_problems(each, getattr(self, each.name))

    def given(self, *names: str) -> list[str]:
        """The names, as messages have them, of those of these options that are not as by default."""
        return [keyword_of(each) for each in fields(self) if each.name in names and self.is_given(each)]

    def is_given(self, each: Field[Any]) -> bool:
        """Whether the option is not as by default."""
        return bool(getattr(self, each.name) != each.default)
