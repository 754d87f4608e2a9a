"""A chat model's answer taken apart: reasoning, content, tool calls.

A response template says how, as in transformers (docs/source/en/chat_response_parsing.md there): fields that begin and
end with literals or patterns, what their text is written in, and what becomes of it.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError

__all__ = ["ResponseTemplate"]

_TOP = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_KEYS = {"open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join", "optional",
         "transform", "transform_each"}  # fmt: skip
_PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_CALL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[-.][A-Za-z0-9_]+)*")
_LARGEST = 2**53 - 1
"""Integers beyond it are no JSON numbers that every reader has."""
_SPELLED = {"true": True, "false": False, "null": None}


class ResponseTemplate:
    """How a model's answers are written. `spec` is a template as transformers has it, `origin` names it in errors.

    A prompt without its anchor is all part of the answer, as in transformers; or, if `may_lack_anchor`, no more of it
    than a field that its end has opened.

    Raises FormatError for a template that transformers would refuse.
    """

    def __init__(self, spec: Any, origin: str = "response_template", *, may_lack_anchor: bool = False) -> None:
        try:
            self._defaults, self._anchor, self._fields = _read(spec)
        except (ValueError, TypeError, re.error) as error:
            raise FormatError(f"{origin} is no response template: {error}.") from None
        self._may_lack_anchor = may_lack_anchor
        self._implicit = next((each for each in self._fields if each.open is None), None)

    def parse(
        self, text: str, prefix: str = "", tools: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The message in a model's answer to the prompt `prefix`, which may begin it. `tools` are the properties of
        each tool's parameters, by its name: what calls give as text becomes of their types.

        Raises ValueError where the answer is not written as the template says.
        """
        try:
            return _Parser(self._defaults, self._fields, self._implicit, tools or {}).run(self._begun(prefix) + text)
        except (AttributeError, IndexError, KeyError, TypeError, RecursionError, re.error) as error:
            # What a template says of a field need not fit what the answer has there.
            raise ValueError(str(error)) from error

    def _begun(self, prefix: str) -> str:
        """What the prompt has of the answer."""
        ends = [found.end() for found in self._anchor.finditer(prefix)]
        if ends or not self._may_lack_anchor:
            return prefix[ends[-1] :] if ends else prefix
        opened = [
            found.start()
            for each in self._fields
            if each.open and each.close
            for found in each.open.finditer(prefix)
            if not each.close.search(prefix, found.end())
        ]
        return prefix[max(opened) :] if opened else ""


@dataclass(frozen=True)
class _Field:
    """A part of an answer. One that nothing opens takes what is between the others."""

    name: str
    open: re.Pattern[str] | None
    close: re.Pattern[str] | None
    content: str = "text"
    content_args: dict[str, Any] = field(default_factory=dict)
    repeats: bool = False
    join: str | None = None
    optional: bool = True
    transform: Any = None
    transform_each: bool = False

    def value(self, text: str, captured: dict[str, str]) -> Any:
        """What becomes of its text. Raises ValueError."""
        value = _parse_content(text, self.content, self.content_args)
        if self.transform is None:
            return value
        if not self.transform_each:
            return _fill(self.transform, {**captured, "content": value})
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise ValueError(f"{self.name} is no list of objects")
        return [_fill(self.transform, {**captured, **each}) for each in value]


def _read(spec: Any) -> tuple[dict[str, Any], re.Pattern[str], list[_Field]]:
    """The defaults, the anchor and the fields of a template. Raises ValueError."""
    if not isinstance(spec, dict) or spec.get("version", 1) != 1:
        raise ValueError("it must be an object of version 1")
    if unknown := sorted({*spec} - _TOP):
        raise ValueError(f"it has the keys {unknown}")
    named, defaults = spec.get("fields"), spec.get("defaults", {})
    if not isinstance(named, dict) or not named or not isinstance(defaults, dict):
        raise ValueError('it must hold "fields", and "defaults" must be an object')
    anchor, fields = _delimiter(spec, "start_anchor"), [_read_field(name, each) for name, each in named.items()]
    if anchor is None:
        raise ValueError('it must have a "start_anchor" or a "start_anchor_pattern"')
    if sum(each.open is None for each in fields) > 1:
        raise ValueError("more than one field has nothing that opens it")
    return defaults, anchor, fields


def _read_field(name: str, given: Any) -> _Field:
    if not isinstance(given, dict) or (unknown := sorted({*given} - _KEYS)):
        raise ValueError(
            f"field {name!r} must be an object" + (f" without {unknown}" if isinstance(given, dict) else "")
        )
    found = _Field(
        name, _delimiter(given, "open"), _delimiter(given, "close"),
        **{key: value for key, value in given.items() if not key.startswith(("open", "close"))},
    )  # fmt: skip
    if found.content not in _PARSERS:
        raise ValueError(f"field {name!r} is written in {found.content!r}, not in one of {', '.join(_PARSERS)}")
    if found.join is not None and not found.repeats:
        raise ValueError(f"field {name!r} is joined and does not repeat")
    return found


def _delimiter(given: Mapping[str, Any], key: str) -> re.Pattern[str] | None:
    """A pattern, or any of some literals, longer ones first."""
    literal, pattern = given.get(key), given.get(f"{key}_pattern")
    if literal is not None and pattern is not None:
        raise ValueError(f"{key} and {key}_pattern exclude each other")
    if literal is not None:
        texts = [literal] if isinstance(literal, str) else literal
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{key} must be a text or a list of texts")
        pattern = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return None if pattern is None else re.compile(pattern, re.DOTALL)


class _Parser:
    """Goes once through an answer."""

    def __init__(
        self,
        defaults: Mapping[str, Any],
        fields: Sequence[_Field],
        implicit: _Field | None,
        tools: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._defaults, self._fields, self._implicit, self._tools = defaults, fields, implicit, tools
        self._message: dict[str, Any] = deepcopy(dict(defaults))
        self._current, self._is_open, self._text = implicit, False, ""
        self._captured: dict[str, str] = {}

    def run(self, text: str) -> dict[str, Any]:
        """The message. Raises ValueError."""
        place, seen = 0, set()  # type: tuple[int, set[Any]]
        while found := self._next_delimiter(text, place):
            opened, match = found
            self._add(text[place : match.start()])
            place, was_open = match.end(), self._is_open
            if opened is None:
                self._captured |= _groups(match)
            self._close()
            if opened is not None:
                self._current, self._is_open, self._captured = opened, True, _groups(match)
            elif not was_open and match.start() == match.end():
                # It would be found again, without end.
                place = len(text)
            if match.start() == match.end():
                # Two that take no character would open and close without end.
                event = (place, opened and opened.name)
                place = len(text) if event in seen else place
                seen.add(event)
        self._add(text[place:])
        self._close()
        if missing := [each.name for each in self._fields if not each.optional and each.name not in self._message]:
            raise ValueError(f"{', '.join(missing)} is missing")
        return {name: value for name, value in self._message.items() if name in self._defaults or not _is_empty(value)}

    def _next_delimiter(self, text: str, place: int) -> tuple[_Field | None, re.Match[str]] | None:
        """What comes first: the longest of several, and the field that it opens, or None where it closes."""
        found = [
            ((match.start(), -len(match[0]), opened is None, each.name), opened, match)
            for each, opened, pattern in self._delimiters()
            if (match := pattern.search(text, place))
        ]
        return min(found, key=lambda each: each[0])[1:] if found else None

    def _delimiters(self) -> Iterator[tuple[_Field, _Field | None, re.Pattern[str]]]:
        if self._current is not self._implicit:
            each = self._current
            if each is not None and each.close is not None:
                yield each, None, each.close
            return
        for each in self._fields:
            if each.open is not None:
                yield each, each, each.open
        if self._implicit is not None and self._implicit.close is not None:
            yield self._implicit, None, self._implicit.close

    def _add(self, text: str) -> None:
        if text and self._current is not None:
            self._is_open = True
            self._text += text

    def _leave(self) -> None:
        self._current, self._is_open, self._text, self._captured = self._implicit, False, "", {}

    def _close(self) -> None:
        """Put what was read into the message."""
        each = self._current
        if each is not None and self._is_open:
            value = self._with_types(each.value(self._text, self._captured))
            if each.join is not None:
                if not isinstance(value, str):
                    raise ValueError(f"{each.name} is joined and no text")
                before = self._message.get(each.name)
                self._message[each.name] = value if before is None else before + each.join + value
            elif each.repeats:
                self._message.setdefault(each.name, []).append(value)
            else:
                self._message[each.name] = value
        self._leave()

    def _with_types(self, value: Any) -> Any:
        """Tool calls, with what is text of the types that their tools say."""
        if isinstance(value, list):
            return [self._with_types(each) for each in value]
        called = value.get("function") if isinstance(value, dict) else None
        if isinstance(called, dict) and isinstance(given := called.get("arguments"), dict):
            known = self._tools.get(called.get("name", ""), {})
            for name in given.keys() & known.keys():
                given[name] = _of_type(given[name], _types_of(known[name]))
        return value


def _groups(match: re.Match[str]) -> dict[str, str]:
    return {name: text for name, text in match.groupdict().items() if text is not None}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict | str) and not value)


def _fill(template: Any, known: Mapping[str, Any]) -> Any:
    """A template with values in the place of {names}. Raises KeyError for one that there is not."""
    if isinstance(template, dict):
        return {key: _fill(value, known) for key, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, known) for value in template]
    place = _PLACEHOLDER.fullmatch(template) if isinstance(template, str) else None
    if place is None:
        return template
    found: Any = known
    for key in place[1].split("."):
        if not isinstance(found, Mapping):
            raise ValueError(f"{place[1]} is not there")
        found = found[key]
    return found


def _types_of(schema: Any) -> list[str]:
    """The types that a JSON schema allows, in its order."""
    if not isinstance(schema, dict):
        return []
    told = schema.get("type")
    found = [told] if isinstance(told, str) else [each for each in told or [] if isinstance(each, str)]
    for key in ("anyOf", "oneOf"):
        found += [each for choice in schema.get(key) or [] for each in _types_of(choice)]
    return [*found, "null"] if schema.get("nullable") and "null" not in found else found


def _of_type(value: Any, types: Sequence[str]) -> Any:
    if isinstance(value, list) and "array" not in types:
        return [_of_type(each, types) for each in value]
    if not isinstance(value, str):
        return value
    for name in types:
        try:
            return _READERS[name](value)
        except (KeyError, ValueError, RecursionError):
            continue
    return value


def _read_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _read_number(text: str) -> float:
    number = float(text)
    if number != number or abs(number) == float("inf"):  # noqa: PLR0124
        raise ValueError(text)
    return int(number) if number.is_integer() and "." not in text else number


def _read_one_of(names: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text.strip() not in names:
            raise ValueError(text)
        return names[text.strip()]

    return read


def _read_json_of(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        found = json.loads(text)
        if not isinstance(found, kind):
            raise ValueError(text)
        return found

    return read


_READERS: dict[str, Callable[[str], Any]] = {
    "integer": _read_integer,
    "number": _read_number,
    "boolean": lambda text: _read_one_of({"true": True, "1": True, "false": False, "0": False})(text.lower()),
    "null": _read_one_of({"null": None, "None": None}),
    "object": _read_json_of(dict),
    "array": _read_json_of(list),
}


def _parse_content(text: str, name: str, options: Mapping[str, Any]) -> Any:
    return _PARSERS[name](text, options)


def _text(text: str, options: Mapping[str, Any]) -> str:
    return text.strip() if options.get("strip", True) else text


def _json(text: str, options: Mapping[str, Any]) -> Any:
    """JSON, perhaps with bare keys (`unquoted_keys`) or strings between other marks (`string_delims`)."""
    plain, strings = text, []
    for begin, end in options.get("string_delims", ()):
        if "\x01" in text:
            raise ValueError("it holds the character U+0001")

        def keep(match: re.Match[str]) -> str:
            strings.append(json.dumps(match[1]))
            return f"\x01{len(strings) - 1}\x01"

        plain = re.sub(f"{re.escape(begin)}(.*?){re.escape(end)}", keep, plain, flags=re.DOTALL)
    if options.get("unquoted_keys"):
        # Strings are matched first, so that nothing in them is taken for a key.
        plain = re.sub(
            r'"(?:\\.|[^"\\])*"|(?<=[{,])(\s*)(\w+)(\s*):',
            lambda match: match[0] if match[2] is None else f'{match[1]}"{match[2]}"{match[3]}:',
            plain,
        )
    plain = re.sub("\x01(\\d+)\x01", lambda match: strings[int(match[1])], plain) if strings else plain
    try:
        return json.loads(plain)
    except ValueError:
        if options.get("allow_non_json"):
            return _text(text, options)
        raise


def _parse_inner(text: str, options: Mapping[str, Any]) -> Any:
    inner = options.get("value_parser")
    return text if inner is None else _parse_content(text, inner.get("name", "text"), inner.get("args", {}))


def _xml_inline(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Tags by `tag_pattern`, whose groups are `key` and `value`; with `merge_duplicates` equal keys make a list."""
    found: dict[str, Any] = {}
    merged = set()
    for match in re.finditer(options["tag_pattern"], text, re.DOTALL):
        key, value = match["key"], _parse_inner(match.groupdict().get("value", ""), options)
        if key in found and options.get("merge_duplicates"):
            found[key] = [*found[key], value] if key in merged else [found[key], value]
            merged.add(key)
        else:
            found[key] = value
    return found


def _kv_lines(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Lines of a key, a colon and a value; `line_sep` and `kv_sep` may be others."""
    separator, found = options.get("kv_sep", ":"), {}
    for line in text.split(options.get("line_sep", "\n")):
        key, colon, value = _text(line, options).partition(separator)
        if colon:
            found[_text(key, options)] = _parse_inner(_text(value, options), options)
    return found


def _call_list(text: str, _: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls as Python writes them: [get_weather(city="Paris")]. Read as a tree; nothing runs."""
    with warnings.catch_warnings(action="ignore"):
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, MemoryError) as error:
            raise ValueError(f"it is no list of calls: {error}") from None
    if not isinstance(tree, ast.List):
        raise ValueError("it is no list of calls")
    return [_read_call(each) for each in tree.elts]


def _read_call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args or not all(each.arg for each in node.keywords):
        raise ValueError("it is no call with named arguments")
    name = ast.unparse(node.func).replace(" - ", "-")
    if not _CALL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a function")
    return {"name": name, "arguments": _distinct([(str(each.arg), _read_value(each.value)) for each in node.keywords])}


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _read_value(node: ast.expr) -> Any:
    """A literal. Raises ValueError for anything else."""
    if isinstance(node, ast.List):
        return [_read_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key is no text")
        return _distinct([(str(key), _read_value(value)) for key, value in zip(keys, node.values, strict=True)])
    if isinstance(node, ast.Name) and node.id in _SPELLED:
        return _SPELLED[node.id]
    is_negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and is_negative else node
    value = constant.value if isinstance(constant, ast.Constant) else ...
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return -value if is_negative else value
    if not is_negative and (value is None or isinstance(value, str | bool)):
        return value
    raise ValueError(f"{ast.unparse(node):.80} is no literal")


_PARSERS: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "text": _text,
    "int": lambda text, options: int(_text(text, options)),
    "float": lambda text, options: float(_text(text, options)),
    "bool": lambda text, options: _text(text, options).lower() in ("true", "1"),
    "json": _json,
    "xml-inline": _xml_inline,
    "kv-lines": _kv_lines,
    "python-call-list": _call_list,
}
"""What the text of a field may be written in."""
