"""Changes of valid files: of JSON as a tree, and of any bytes as they are."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 7, 64, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**47, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63),
    10**30, 0.5, -0.0, 1e-320, 1e30, 1e308, 1.0,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\ud800", "\udfff\ud800", "é", "e\u0301", "<s>", "a" * 5000, "🙂" * 300, "../../etc/passwd",
    "/dev/zero", "\x1b[31m", "{{ 7 * 7 }}", "(a+)+$", "%s%n", "null", "NaN", "\u2028", "float32", "*", "-1", "[UNK]",
    "\\", "'", '"',
)  # fmt: skip
_RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "1" * 400,
    "-",
    "01",
    '"\\ud800"',
    "\ufeff",
    "//",
    "[" * 2000,
    '{"a":' * 200,
)


def tree(chance: random.Random, text: bytes) -> bytes:
    """JSON with one to four of its values changed; now and then its text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return raw(chance, text)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        value = _changed(chance, value)
    made = json.dumps(value, ensure_ascii=chance.random() < 0.8)
    if chance.random() < 0.15:
        made = _respelt(chance, made)
    data = made.encode("utf-8", "surrogatepass")
    return raw(chance, data) if chance.random() < 0.05 else data


def raw(chance: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut off, left out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + chance.choice((1, 2, 8, 100))]
        elif kind == 3:
            changed[at:at] = changed[at : at + chance.choice((1, 8, 64, 1000))]
        elif kind == 4:
            changed[at:at] = chance.choice(
                (b"\0", b"\xff", b"\xff\xfe", b"\r\n", b"}", b'"', bytes(8), b"\xed\xa0\x80")
            )
        elif at < len(changed):
            changed[at] = chance.choice((0, 255, 0x7F, 0x80, chance.randrange(256)))
    return bytes(changed)


def _changed(chance: random.Random, whole: Any) -> Any:
    places = list(_places(whole))
    if not places or chance.random() < 0.01:
        return _any(chance)
    holder, key = chance.choice(places)
    kind = chance.random()
    if kind < 0.15:
        del holder[key]
    elif kind < 0.30:
        other, place = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[place]))
    elif kind < 0.36 and isinstance(holder, dict):
        holder[chance.choice((*TEXTS, str(key) + "x"))] = holder.pop(key) if chance.random() < 0.5 else _any(chance)
    elif kind < 0.42 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * chance.choice((1, 2, 70, 300))
    elif kind < 0.70:
        holder[key] = _near(chance, holder[key])
    else:
        holder[key] = _any(chance)
    return whole


def _near(chance: random.Random, value: Any) -> Any:
    """Of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return chance.choice((*NUMBERS, value + 1, value - 1, value * 2, -value))
    if isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        return chance.choice(
            (*TEXTS, value[:at], value + value, value[:at] + chance.choice(TEXTS) + value[at:], value.upper())
        )
    if isinstance(value, list):
        return chance.choice((value[::-1], value + value, value[:1], [], [value]))
    return {} if isinstance(value, dict) else _any(chance)


def _any(chance: random.Random) -> Any:
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice((None, True, False, [], {}, [[]], {"": None}))
    if kind in (1, 2, 3):
        return chance.choice(NUMBERS)
    if kind == 4:
        value: Any = chance.choice(NUMBERS)
        for _ in range(chance.choice((5, 20, 30, 150))):
            value = [value] if chance.random() < 0.5 else {"a": value}
        return value
    if kind == 5:
        return [chance.choice(NUMBERS)] * chance.choice((1, 3, 70, 5000))
    return chance.choice(TEXTS)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    ):
        yield value, key
        yield from _places(inner)


def _respelt(chance: random.Random, text: str) -> str:
    """Something that a JSON writer does not write: a key twice, a number that is none."""
    commas = [at for at, letter in enumerate(text) if letter == ","]
    if not commas:
        return text
    start = chance.choice(commas)
    end = next((at for at in commas if at > start), len(text))
    if chance.random() < 0.5:
        return text[:end] + text[start:end] + text[end:]
    return text[: start + 1] + chance.choice(_RAW) + text[end:]
