"""Escape untrusted text for a terminal.

A model's name or task, a label, an answer may hold escape sequences that move the cursor, hide text or write to the
clipboard, and marks that reverse the order in which text is read.
"""

from __future__ import annotations

import re
import shlex

__all__ = ["escaped_json", "first_line", "printable", "quoted"]

_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks of direction, line separators, and halves of characters, which cannot be encoded."""
_LAYOUT = "\n\t"


def printable(text: object, keep: str = _LAYOUT) -> str:
    """The text with control characters escaped, such as \\x1b; `keep` are characters that stay."""
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def escaped_json(text: str) -> str:
    """The same JSON document, safe to show: control characters can only be in its strings, where they are escaped."""
    return _OBEYED.sub(lambda found: found[0] if found[0] in _LAYOUT else f"\\u{ord(found[0]):04x}", text)


def quoted(word: object) -> str:
    """Quote one word of a command to paste into a shell, which takes it neither for more words nor for an option."""
    text = str(word)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of an error's message; where it has none `otherwise`, by default the name of its class."""
    return (str(error).strip() or otherwise or type(error).__name__).splitlines()[0]


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
