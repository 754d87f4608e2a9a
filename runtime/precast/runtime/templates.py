"""Chat templates, rendered in the sandbox in which transformers renders them, rebuilt after its chat_template_utils."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any

from .errors import InputError, OutOfMemoryError

__all__ = ["render"]


def render(source: str, name: str, variables: Mapping[str, Any]) -> str:
    """The text that the template `source` makes of `variables`; `name` says in errors which one it is.

    A template may take any time and memory: whoever renders those of strangers sets limits around the process.

    Raises InputError where it refuses or fails, OutOfMemoryError where its text is too large.
    """
    from jinja2.exceptions import TemplateError

    try:
        text: str = _environment().from_string(source).render(variables)
        return text
    except TemplateError as error:
        raise InputError(f"{name} refused this conversation: {error}") from error
    except MemoryError as error:
        raise OutOfMemoryError(f"{name} makes a text of this conversation for which there is no memory.") from error
    except Exception as error:
        # A template may raise whatever Python does: 1/0, a macro that calls itself, a sum of a number and a text.
        raise InputError(f"{name} failed{_place(error)}: {type(error).__name__}: {error}") from error


def _place(error: Exception) -> str:
    """The line of the template, where it was running."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f" in line {lines[-1]}" if lines else ""


@cache
def _environment() -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
