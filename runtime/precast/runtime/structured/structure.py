"""What form an answer is asked to have, by the arguments of generate()."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError

__all__ = ["STRUCTURES", "Structure", "find_structure"]

_MAX_TEXT = 1_000_000
"""Characters of a schema, a pattern or a grammar."""


@dataclass(frozen=True)
class Structure:
    """A form, and the argument that asks for it.

    Attributes:
        name: the argument's name, for messages.
        kind: what `text` is written in; a schema is JSON, choices are a JSON list of strings.
    """

    name: str
    kind: Literal["json_schema", "regex", "grammar", "choices"]
    text: str


def find_structure(given: Mapping[str, Any]) -> Structure | None:
    """The form that these arguments ask for, None for text of any form. Raises InputError."""
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} each give an answer a form; pass one of them.")
    for name, value in asked.items():
        found = STRUCTURES[name](name, value)
        if found is not None and len(found.text) > _MAX_TEXT:
            raise InputError(f"{name} has {len(found.text)} characters; {_MAX_TEXT} are the most that is compiled.")
        return found
    return None


def _of_json_schema(name: str, value: Any) -> Structure:
    """A schema as an object, as JSON text, or as a class of pydantic."""
    describe = getattr(value, "model_json_schema", None)
    try:
        schema = describe() if callable(describe) else value
    except Exception as error:
        # pydantic raises what it likes for fields that have no schema.
        raise InputError(f"{name}: {value!r:.80} has no JSON schema: {error}.") from error
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is no JSON: {error}. Pass a schema as a dict, or as JSON text.") from None
    if not isinstance(schema, dict | bool):
        raise InputError(f"{name} must be a JSON schema, a dict or JSON text, not {value!r:.80}.")
    try:
        return Structure(name, "json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be written as JSON: {error}.") from None


def _of_text(kind: Literal["regex", "grammar"]) -> Callable[[str, Any], Structure]:
    def check(name: str, value: Any) -> Structure:
        if not isinstance(value, str) or not value:
            raise InputError(f"{name} must be a text that is not empty, not {value!r:.80}.")
        return Structure(name, kind, value)

    return check


def _of_choices(name: str, value: Any) -> Structure:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, str) and each for each in value):
        raise InputError(f"{name} must be a list of texts, none of them empty, not {value!r:.80}.")
    return Structure(name, "choices", json.dumps([*dict.fromkeys(value)]))


def _of_response_format(name: str, value: Any) -> Structure | None:
    """As OpenAI's API has it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure(name, "json_schema", '{"type": "object"}')
    if kind == "json_schema":
        named = value.get("json_schema")
        if not isinstance(named, dict) or "schema" not in named:
            raise InputError(
                f'{name} of type "json_schema" holds its schema as {{"json_schema": {{"name": …, "schema": …}}}}; this '
                f"is {value!r:.80}."
            )
        return _of_json_schema(f"{name}'s schema", named["schema"])
    raise InputError(
        f'{name} must be {{"type": "text"}}, {{"type": "json_object"}} or {{"type": "json_schema", "json_schema": '
        f'{{"schema": …}}}}, not {value!r:.80}. For other forms pass regex=, grammar= or choices=.'
    )


STRUCTURES: dict[str, Callable[[str, Any], Structure | None]] = {
    "response_format": _of_response_format,
    "json_schema": _of_json_schema,
    "regex": _of_text("regex"),
    "grammar": _of_text("grammar"),
    "choices": _of_choices,
}
"""The arguments that give an answer a form, and what reads each."""
