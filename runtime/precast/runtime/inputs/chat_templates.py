"""Render chat templates in a sandbox like transformers' (rebuilt after its chat_template_utils)."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from inspect import isfunction, ismethod
from typing import Any

import numpy as np

from ..errors import InputError, OutOfMemoryError
from .tool_schemas import describe_function

__all__ = ["Conversation", "is_batch", "render_chat"]

Message = dict[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message's reasoning is passed; the first is what templates read."""
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True)
class Conversation:
    """A conversation and the other variables of its template.

    Attributes:
        messages: each a mapping, a dataclass or a pydantic model, or one object that has them as `.messages`.
        tools: JSON schemas, or Python functions with type hints and a docstring.
        documents: mappings, with "title" and "text" as a rule.
        add_generation_prompt: whether the answer begins after it.
        continue_final_message: the key of the last message that the answer goes on with, True for "content".
        variables: whatever else the template may read.
    """

    messages: Any
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool | str = False
    variables: Mapping[str, Any] = field(default_factory=dict)


def is_batch(conversation: Any) -> bool:
    """Whether these are several conversations."""
    first = conversation[0] if isinstance(conversation, list | tuple) and conversation else None
    return isinstance(first, list | tuple) or hasattr(first, "messages")


def render_chat(source: str, name: str, talk: Conversation) -> str:
    """Render the template `source` for a conversation; errors call the template `name`.

    A template may take any time and memory: set limits around the process to render those of strangers.

    Raises InputError for what is no conversation, and where the template refuses it or fails; OutOfMemoryError where
    its text is too large.
    """
    try:
        given = {"tools": _tool_schemas(talk.tools), "documents": _check_documents(talk.documents), **talk.variables}
        variables = {key: _to_json_types(value) for key, value in given.items()}
        messages = _check_messages(talk.messages)
    except RecursionError as error:
        raise InputError("The conversation, its tools or its documents hold themselves, or nest too deep.") from error
    variables |= {"messages": messages, "add_generation_prompt": talk.add_generation_prompt}
    if not talk.continue_final_message:
        return _render_template(source, name, variables)
    key = "content" if talk.continue_final_message is True else talk.continue_final_message
    last = _mark_last_message(messages, key, source, name)
    return _cut_at_mark(_render_template(source, name, variables), last, name)


def _render_template(source: str, name: str, variables: Mapping[str, Any]) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = _compile_template(source).render(variables)
        return text
    except TemplateError as error:
        raise InputError(f"{name} refused this conversation: {error}") from error
    except MemoryError as error:
        raise OutOfMemoryError(f"{name} makes a text of this conversation for which there is no memory.") from error
    except Exception as error:
        # A template may raise whatever Python does: 1/0, a macro that calls itself, a sum of a number and a text.
        raise InputError(f"{name} failed{_line_of(error)}: {type(error).__name__}: {error}") from error


def _line_of(error: Exception) -> str:
    """The line of the template, where it was running."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f" in line {lines[-1]}" if lines else ""


# ---------------------------------------------------------------- a template's variables


def _check_messages(conversation: Any) -> list[Message]:
    """A conversation's messages without keys that hold None, which templates would write out."""
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, list | tuple):
        raise InputError(
            f'A conversation is a list of messages [{{"role": …, "content": …}}]; this is {messages!r:.80}.'
        )
    if not messages:
        raise InputError("The conversation is empty; it takes at least one message.")
    found = []
    for message in map(_to_json_types, messages):
        if not isinstance(message, dict):
            raise InputError(f'A message is a mapping {{"role": …, "content": …}}; this is {message!r:.80}.')
        found.append(_with_reasoning({key: value for key, value in message.items() if value is not None}))
    return found


def _with_reasoning(message: Message) -> Message:
    """Reasoning under the name that most templates read, and under that of gpt-oss."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tool_schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    return None if tools is None else [_tool_schema(tool) for tool in _check_list(tools, "tools")]


def _tool_schema(tool: Any) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        return tool
    if isfunction(tool) or ismethod(tool):
        return describe_function(tool)
    raise InputError(
        f"A tool is a JSON schema, or a Python function with type hints and a docstring; this is {tool!r:.80}."
    )


def _check_documents(documents: Sequence[Any] | None) -> list[Any] | None:
    if documents is None:
        return None
    found = _check_list(documents, "documents")
    for document in found:
        if not isinstance(document, Mapping):
            raise InputError(f'A document is a mapping {{"title": …, "text": …}}; this is {document!r:.80}.')
    return found


def _check_list(values: Any, name: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise InputError(f"{name} is a list; this is {values!r:.80}.")
    return list(values)


_BARE: dict[type, Callable[[Any], Any]] = {
    # Enums and numbers of NumPy are also str, int or float: no more than that is left of them.
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    list: lambda values: list(map(_to_json_types, values)),
    tuple: lambda values: tuple(map(_to_json_types, values)),
    np.generic: lambda value: _to_json_types(value.item()),
}


def _to_json_types(value: Any) -> Any:
    """Rebuild a value from JSON's types; anything else, such as an image, becomes its type's name.

    The sandbox does not know which methods of other objects are dangerous: some write files.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind, bare in _BARE.items():
        if isinstance(value, kind):
            return bare(value)
    if isinstance(value, Mapping):
        return {_to_json_types(key): _to_json_types(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _to_json_types(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        # Models of pydantic, such as the messages that OpenAI's client answers.
        return _to_json_types(value.model_dump())
    return f"<{type(value).__name__}>"


# ---------------------------------------------------------------- continuing the last message


def _mark_last_message(messages: list[Message], key: str, source: str, name: str) -> str:
    """Put a mark after the last message's text, wherever the template may read it; returns the text."""
    last = messages[-1].get(key)
    if last is None:
        raise InputError(f'The last message has no "{key}" to go on with.')
    keys = [each for each in _REASONING if messages[-1].get(each) == last] if key in _REASONING else [key]
    if not any(each in source for each in keys):
        raise InputError(f'{name} does not read "{key}", so it cannot be gone on with.')
    if isinstance(last, str):
        messages[-1].update(dict.fromkeys(keys, last + _MARK))
        return last
    parts = [part for part in last if isinstance(part, dict) and "text" in part] if isinstance(last, list) else []
    if not parts or not isinstance(text := parts[-1]["text"], str):
        raise InputError(f'The last message\'s "{key}" has no text to go on with.')
    parts[-1]["text"] = text + _MARK
    return text


def _cut_at_mark(text: str, last: str, name: str) -> str:
    place = text.rfind(_MARK.strip())
    if place < 0 or last.strip() not in text:
        raise InputError(f"{name} changes the last message, so it cannot be continued.")
    # Where the template strips messages, the mark has lost its own space, and what stands before it is stripped, too.
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()


# ---------------------------------------------------------------- the sandbox


@lru_cache(maxsize=16)
def _compile_template(source: str) -> Any:
    return _make_environment().from_string(source)


@cache
def _make_environment() -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _namespace_class()
    return environment


def _generation_tag() -> Any:
    """`{% generation %}…{% endgeneration %}` around the model's answers: training needs it, a prompt ignores it."""
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as its base class has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

        def _as_it_is(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation


class _Dict:
    """`dict` for templates: not the class itself, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args)


def _namespace_class() -> Any:
    """jinja's namespace(), which stores no names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace stores no attribute that begins with an underscore, such as {name!r}")

    class Checked(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            # As in jinja: whatever stands before the values has no name, so that `namespace(self=1)` works.
            values = dict(*args[1:], **kwargs)
            for name in values:
                check(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Checked


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
