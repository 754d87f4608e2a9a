"""Read JSON files of checkpoints as leniently as transformers, and check the types of the keys that are used.

Unlike the contract, such a file may have any other keys.
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
    """Parse `data` as an object. Raises FormatError, which says what is wrong with the file `name`."""
    check_depth(data, name, _MAX_DEPTH)
    try:
        value = json.loads(data.decode())
    except ValueError as error:
        raise FormatError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} holds {value!r:.40}, not an object.")
    return value


def select(values: Mapping[str, Any], types: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Select the keys of `values` that `types` names, converted to these types; null counts as missing. Raises
    FormatError, which names the key, its value and the type."""
    found = {}
    for key, kind in types.items():
        if values.get(key) is not None:
            try:
                found[key] = msgspec.convert(values[key], kind, str_keys=True)
            except (msgspec.ValidationError, UnicodeEncodeError) as error:
                raise FormatError(f"{name} has {key}: {json.dumps(values[key]):.60}. {error}.") from None
    return found
