"""JSON as the contract wants it: no duplicate keys, no absurd depth or size, one canonical form."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from ..errors import FormatError

__all__ = ["canonical_digest", "dumps", "loads"]

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 24


def loads(data: bytes, name: str) -> dict[str, Any]:
    """Parse `data`, refusing what a lenient parser would silently repair. Raises FormatError, which names `name`."""
    if len(data) > MAX_BYTES:
        raise FormatError(f"{name} is {len(data):,} bytes; at most {MAX_BYTES:,} are read.")
    _check_depth(data, name)
    try:
        value = json.loads(data, object_pairs_hook=lambda pairs: _unique(pairs, name), parse_constant=_no_constant)
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} holds a {type(value).__name__}, not an object.")
    return value


def dumps(value: Any) -> bytes:
    """The form in which precast writes JSON: sorted keys, two spaces, one final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def canonical_digest(value: Any) -> str:
    """sha256 of the canonical (compact, sorted, UTF-8) form of `value`, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"{name} has the key {twice!r} twice in one object.")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _check_depth(data: bytes, name: str) -> None:
    """Count brackets outside strings before the recursive parser sees them."""
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data, flags=re.DOTALL)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise FormatError(f"{name} nests more than {MAX_DEPTH} levels deep.")
