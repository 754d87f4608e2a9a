"""Options that several commands share, and the types of their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

__all__ = ["LENGTHS", "hub_options", "json_option", "model_options", "quiet_option"]

F = TypeVar("F", bound=Callable[..., Any])


if TYPE_CHECKING:
    _LengthsType = click.ParamType[tuple[int, ...]]
else:
    # Generic only since click 8.4.
    _LengthsType = click.ParamType


class _Lengths(_LengthsType):
    """One whole number, or several with commas."""

    name = "N[,N…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number, nor several separated by commas.", param, ctx)


LENGTHS = _Lengths()

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")


def hub_options(function: F) -> F:
    """--revision and --token."""
    function = click.option("--token", metavar="TOKEN", help="Hub token, if not logged in (HF_TOKEN).")(function)
    return click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")(function)


def model_options(function: F) -> F:
    """How to open an artifact."""
    for option in reversed(
        [
            click.option("--subfolder", metavar="DIR", help="Where in MODEL the artifact lies."),
            click.option("--local-files-only", is_flag=True, help="Do not ask the Hub."),
            click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0 is one per core."),
            click.option("--variant", metavar="NAME", help="Which compiled form to use."),
            click.option("--verify", is_flag=True, help="Hash every file again."),
            click.option("--sha256", metavar="DIGEST", help="Open only the artifact with this digest."),
            click.option("--trust-native-code", is_flag=True, help="Run native code that was built elsewhere."),
        ]
    ):
        function = option(function)
    return hub_options(function)
