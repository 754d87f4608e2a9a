"""JSON that other people publish: whatever transformers reads is read, and what this runtime uses of it has its type.

Unlike the contract, such a file may say anything else besides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import FormatError
from .strict_json import check_depth

__all__ = ["parse_object", "select"]

_MAX_DEPTH = 100


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The object that `data` holds. Raises FormatError, which says what is wrong with the file `name`."""
    check_depth(data, name, _MAX_DEPTH)
    try:
        value = json.loads(data.decode())
    except ValueError as error:
        raise FormatError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} holds {value!r:.40}, not an object.")
    return value


def select(values: Mapping[str, Any], types: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of `values` those that `types` names, as these types; null is like no value. Raises FormatError, which names the
    key, its value and what it should be."""
    found = {}
    for key, kind in types.items():
        if values.get(key) is not None:
            try:
                found[key] = msgspec.convert(values[key], kind, str_keys=True)
            except (msgspec.ValidationError, UnicodeEncodeError) as error:
                raise FormatError(f"{name} has {key}: {json.dumps(values[key]):.60}. {error}.") from None
    return found
