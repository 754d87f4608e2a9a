"""Messages in the answers of chat models, malformed ones included."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .response_families import ENDS
from .response_template import ResponseTemplate
from .tool_schemas import describe_function

__all__ = ["parse_answers"]

_END = re.compile(rf"(?:{ENDS})\s*\Z")


def parse_answers(
    template: ResponseTemplate, answers: Sequence[str], prefixes: Sequence[str], tools: Sequence[Any] | None
) -> list[dict[str, Any]]:
    """The message in each answer to the prompts `prefixes`, one for all or one for each; `tools` are schemas, or
    functions. Raises InputError."""
    begun = [*prefixes] * len(answers) if len(prefixes) == 1 else [*prefixes]
    if len(begun) != len(answers):
        raise InputError(f"There are {len(answers)} responses and {len(begun)} prefixes; pass one, or one for each.")
    if tools is not None and not isinstance(tools, list | tuple):
        raise InputError(f"tools must be a list of functions or schemas, not {tools!r:.80}.")
    known = dict(map(_properties, tools or ()))
    return [_parse(template, *pair, known) for pair in zip(answers, begun, strict=True)]


def _parse(template: ResponseTemplate, text: str, prefix: str, tools: Mapping[str, Any]) -> dict[str, Any]:
    """An answer's message; all of it is content where it is not written as it should be, as in a call cut off."""
    try:
        found = template.parse(text, prefix, tools)
    except ValueError:
        return _all_content(text)
    if isinstance(content := found.get("content"), str):
        found["content"] = content.strip()
    is_nothing = not any(value for name, value in found.items() if name != "role")
    return _all_content(text) if is_nothing and text else found


def _all_content(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": _END.sub("", text).strip()}


def _properties(tool: Any) -> tuple[str, Mapping[str, Any]]:
    """The name of a tool, and the properties of its parameters."""
    schema = describe_function(tool) if callable(tool) else tool
    told = schema.get("function", schema) if isinstance(schema, Mapping) else None
    if not isinstance(told, Mapping) or not isinstance(name := told.get("name"), str):
        raise InputError(f"A tool is a function, or its JSON schema with a name; this is {tool!r:.80}.")
    parameters = told.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return name, properties if isinstance(properties, Mapping) else {}
