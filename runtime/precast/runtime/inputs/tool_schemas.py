"""The JSON schema of a Python function as a tool of a chat, as transformers' get_json_schema writes it."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union

from ..errors import InputError

__all__ = ["describe_function"]

Schema = dict[str, Any]
_SCALARS: dict[type, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_TYPES: dict[Any, Schema] = {
    **{kind: {"type": name} for kind, name in _SCALARS.items()},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_TYPES_OF_OTHERS = {"PIL.Image.Image": "image", "torch.Tensor": "audio"}
"""Types by name, so that this module need not import their libraries."""

_SUMMARY = re.compile(r"^(.*?)[\n\s]*(Args:|Returns:|Raises:|\Z)", re.DOTALL)
_ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)[\n\s]*(Returns:|Raises:|\Z)", re.DOTALL)
_ARGUMENT = re.compile(
    r"""
    (?:^|\n)([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*            # "name:" or "name (type):", with its indentation
    (.*?)\s*                                                    # what it is, which may go on over lines
    (?=\n(?!\1[ \t])[ \t]*\w+(?:[ \t]*\([^()\n]*\))?:|\Z)       # up to the next name that is not indented deeper
    """,
    re.DOTALL | re.VERBOSE,
)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)[\n\s]*(Raises:|\Z)", re.DOTALL)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def describe_function(function: Callable[..., Any]) -> Schema:
    """The schema of a function, from its type hints and its docstring in Google's style.

    Raises InputError where it lacks either, or a type that JSON has no word for.
    """
    name = getattr(function, "__name__", "operation")
    try:
        return {"type": "function", "function": {"name": name, **_describe(function)}}
    except Exception as error:
        # Hints are the user's code: evaluating them may raise anything.
        raise InputError(
            f"The function {name}() cannot be given as a tool: {error} Give its JSON schema instead, or mend it."
        ) from error


def _describe(function: Callable[..., Any]) -> Schema:
    document = (inspect.getdoc(function) or "").strip()
    if not document:
        raise ValueError("it has no docstring.")
    summary = _SUMMARY.search(document)
    parameters, answer = _describe_parameters(function, _argument_texts(document))
    described: Schema = {"description": summary.group(1).strip() if summary else None, "parameters": parameters}
    if answer is None:
        return described
    if (text := _RETURNS.search(document)) is not None:
        answer["description"] = text.group(1).strip()
    return {**described, "return": answer}


def _argument_texts(document: str) -> dict[str, str]:
    section = _ARGUMENTS.search(document)
    if section is None:
        return {}
    lines = "\n".join(line for line in section.group(1).split("\n") if line.strip())
    return {name: re.sub(r"\s*\n+\s*", " ", text.strip()) for _, name, text in _ARGUMENT.findall(lines)}


def _describe_parameters(function: Callable[..., Any], texts: dict[str, str]) -> tuple[Schema, Schema | None]:
    """The schema of all parameters, and that of the return value where JSON has a type for it."""
    hints, parameters = typing.get_type_hints(function), list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].annotation is inspect.Parameter.empty:
        parameters = parameters[1:]
    schemas = {}
    for each in parameters:
        if each.name not in hints:
            raise ValueError(f"its parameter {each.name} has no type hint.")
        if each.name not in texts:
            raise ValueError(f"its docstring does not describe the parameter {each.name}.")
        schemas[each.name] = _add_description(_schema_of(hints[each.name]), texts[each.name])
    result: Schema = {"type": "object", "properties": schemas}
    if required := [each.name for each in parameters if each.default is inspect.Parameter.empty]:
        result["required"] = required
    return result, _schema_or_none(hints["return"]) if "return" in hints else None


def _add_description(schema: Schema, text: str) -> Schema:
    choices = _CHOICES.search(text)
    if choices is None:
        return {**schema, "description": text}
    values = [value.strip() if isinstance(value, str) else value for value in json.loads(choices.group(1))]
    return {**schema, "enum": values, "description": text[: choices.start()].strip()}


def _schema_or_none(hint: Any) -> Schema | None:
    # The model never writes what a function returns: a type without a word for it is no reason to refuse the tool.
    try:
        return _schema_of(hint)
    except ValueError:
        return None


def _schema_of(hint: Any) -> Schema:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None or (origin in _TYPES and not arguments):
        return _type_schema(origin or hint)
    if origin in (Union, types.UnionType):
        return _union_schema(arguments)
    if origin is Literal:
        return _enum_schema(list(arguments), hint)
    if origin is list:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_schema_of(each) for each in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    raise ValueError(f"the type {hint} has no JSON schema; use a list for any number of values.")


def _type_schema(hint: Any) -> Schema:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum_schema([member.value for member in hint], hint)
    if hint in _TYPES:
        return dict(_TYPES[hint])
    name = f"{getattr(hint, '__module__', '')}.{getattr(hint, '__qualname__', '')}"
    if name in _TYPES_OF_OTHERS:
        return {"type": _TYPES_OF_OTHERS[name]}
    raise ValueError(f"the type {hint} has no JSON schema.")


def _enum_schema(values: list[Any], hint: Any) -> Schema:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(f"the values of {hint} are not all texts, numbers, booleans or None.")
    names = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _union_schema(arguments: tuple[Any, ...]) -> Schema:
    schemas = [_schema_of(each) for each in arguments if each is not type(None)]
    if len(schemas) == 1:
        union = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        names = sorted({schema["type"] for schema in schemas})
        union = {"type": names[0] if len(names) == 1 else names}
    else:
        union = {"anyOf": schemas}
    return {**union, "nullable": True} if type(None) in arguments else union
