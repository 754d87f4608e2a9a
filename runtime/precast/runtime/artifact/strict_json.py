"""Strict JSON for the contract: no duplicate keys, limited depth and size, one canonical form."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from typing import Any

from ..errors import FormatError

__all__ = ["canonical_digest", "check_depth", "dumps", "loads"]

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 24


def loads(data: bytes, name: str) -> dict[str, Any]:
    """Parse `data`, refusing what a lenient parser would silently repair. Raises FormatError, which names `name`."""
    if len(data) > MAX_BYTES:
        raise FormatError(f"{name} is larger than {MAX_BYTES:,} bytes, the most that is read.")
    check_depth(data, name)
    try:
        # Decoded here: json.loads() would guess UTF-16 too, whose brackets check_depth() does not see.
        text = data.decode()
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _reject_duplicates(pairs, name),
            parse_constant=_no_constant,
            parse_float=_parse_finite,
        )
        if "\\u" in text:
            # Half of a surrogate pair is no text: it has no UTF-8 form, hence no digest.
            canonical_digest(value)
    except ValueError as error:
        raise FormatError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} holds a {type(value).__name__}, not an object.")
    return value


def dumps(value: Any) -> bytes:
    """Write JSON as precast does: sorted keys, two spaces, one final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def canonical_digest(value: Any) -> str:
    """sha256 of the canonical (compact, sorted, UTF-8) form of `value`, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _reject_duplicates(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FormatError(f"{name} has the key {twice!r} twice in one object.")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _parse_finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large a number")
    return value


def check_depth(data: bytes, name: str, limit: int = MAX_DEPTH) -> None:
    """Count brackets outside strings before the recursive parser sees them. Raises FormatError."""
    # In two steps, each without backtracking: an unclosed string must not cost quadratic time.
    without_escapes = re.sub(rb"\\.", b"", data, flags=re.DOTALL)
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"[^"]*"?', b"", without_escapes)):
        depth += 1 if bracket in b"[{" else -1
        if depth > limit:
            raise FormatError(f"{name} nests more than {limit} levels deep.")
