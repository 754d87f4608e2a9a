"""Chat templates without transformers give transformers' texts."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import tiny
import transformers
from corpus import CORPUS, needs_corpus
from transformers.utils import get_json_schema

from precast.runtime import Tokenizer
from precast.runtime.errors import InputError, UsageError
from precast.runtime.inputs.tool_schemas import describe_function
from precast.runtime.pipelines.generation import _full_text

HELLO = [{"role": "user", "content": "Hello"}]


class Unit(enum.Enum):
    celsius = "C"
    kelvin = "K"


class Named(str, enum.Enum):
    user = "user"


@dataclasses.dataclass
class Said:
    role: str
    content: str
    tool_calls: Any = None


class Model:
    """As a model of pydantic."""

    def model_dump(self):
        return {"role": "user", "content": "Hello", "refusal": None, "audio": None}


def weather(
    place: str,
    days: list[int],
    unit: Unit,
    kind: Literal["rain", 1, None] = None,
    more: dict[str, float] | None = None,
    pair: tuple[int, str] = (1, ""),
    either: int | str | None = None,
    mixed: list[int] | str = "",
    anything: Any = None,
    bare: list = (),  # type: ignore[type-arg]
) -> str:
    """
    What the weather will be.

    In two paragraphs.

    Args:
        place: A town,
            or a village
        days (list of int): Which days
        unit: The unit (choices: ["C", "K "])
        kind: Of what
        more: Factors
        pair: Two
        either: One of two
        mixed: Several
        anything: At all
        bare: A list

    Returns:
        A sentence.

    Raises:
        ValueError: if there is none
    """
    return place


class Tools:
    def weather(self, place: str) -> None:
        """The weather.

        Args:
            place: A town
        """


def image_of(picture: "PIL.Image.Image", sound: "torch.Tensor") -> object:  # type: ignore[name-defined]  # noqa: F821, UP037
    """Look and hear.

    Args:
        picture: To see
        sound: To hear
    """


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds <&> ü", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
IMAGE = np.zeros((2, 2, 3), np.uint8)
TALKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one": (HELLO, {}),
    "answered": ([*HELLO, {"role": "assistant", "content": " Yes? "}], {"add_generation_prompt": False}),
    "system": ([{"role": "system", "content": "Be {{ brief }}."}, *HELLO], {}),
    "turns": ([*HELLO, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "你好 <|end|>"}], {}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]}], {}),
    "image": (
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]}], {},
    ),
    "tools": (HELLO, {"tools": [TOOL, weather]}),
    "tool calls": (
        [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "1ü"}],
        {"tools": [TOOL]},
    ),
    "documents": (HELLO, {"documents": [{"title": "A", "text": "Text"}, {"title": "B", "text": "More"}]}),
    "thinking": (
        [*HELLO, {"role": "assistant", "content": "Yes", "reasoning": "Hm"}, {"role": "user", "content": "Why?"}],
        {"enable_thinking": False, "date_string": "1 May 2026"},
    ),
    "objects": ([Said("system", "Brief."), Model()], {"flag": np.bool_(False), "level": Named.user}),
    "goes on": ([*HELLO, {"role": "assistant", "content": "It is "}], {"continue_final_message": True}),
}  # fmt: skip
"""Messages and options."""

TEMPLATES = {
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} {% endgeneration %}"
        "{% else %}{{ m.role }}:{{ m.content }}\n{% endif %}{% endfor %}"
    ),
    "all": (
        "{{ bos_token }}{{ image_token }}{{ video }}{{ tools | tojson(indent=2) }}{{ documents | tojson }}{{ level }}"
        "{{ flag }}"
        "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}\n"
        "{% if m.tool_calls is defined %}{% for call in m.tool_calls %}{{ call.function | items | list }}{% endfor %}"
        "{% endif %}{{ m.content }}{{ m.reasoning_content }}{{ m.thinking }}{% if ns.n > 2 %}{% break %}{% endif %}"
        "{% endfor %}{{ dict(a=ns.n) }}{{ dict.fromkeys('ab', 1) }}{{ enable_thinking }}{{ eos_token }}"
        "{% if add_generation_prompt %}>{% endif %}"
    ),
    "stripped": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}",
}


def _texts(tokenizer: Any, template: str, talk: Any, options: dict[str, Any]) -> Any:
    """The text, or the word "refused"."""
    try:
        return tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, **options)
    except InputError:
        return "refused"


def _expected(tokenizer: Any, template: str, talk: Any, options: dict[str, Any]) -> Any:
    defaults = {"add_generation_prompt": not options.get("continue_final_message")}
    try:
        return tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, **{**defaults, **options})
    except Exception:  # Templates raise whatever Python does.
        return "refused"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    theirs = tiny.tokenizer()
    theirs.init_kwargs |= {"image_token": "<mask>", "extra_special_tokens": {"video": "</s>"}}
    theirs.save_pretrained(path)
    return Tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_given_what_transformers_gives_it(pair, template, talk):
    ours, theirs = pair
    expected = _expected(theirs, TEMPLATES[template], *TALKS[talk])
    assert _texts(ours, TEMPLATES[template], *TALKS[talk]) == expected
    assert expected != "refused" or talk in ("goes on", "parts", "image")


ESCAPES = [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__ }}", "{{ lipsum.__globals__['os'].getcwd() }}", "{{ strftime_now.__globals__ }}",
    "{{ raise_exception.__closure__ }}", "{{ '{0.__class__}'.format(1) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}", "{{ ('{0.__class__}'|attr('format'))(1) }}",
    "{{ messages.append(1) }}", "{{ messages[0].update({'role': 'system'}) }}", "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
]  # fmt: skip


@pytest.mark.parametrize("template", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(pair, template):
    ours, theirs = pair
    found = _texts(ours, template, HELLO, {})
    assert found in ("", "refused")
    assert found == _expected(theirs, template, HELLO, {})
    assert HELLO == [{"role": "user", "content": "Hello"}]


@pytest.mark.slow
@needs_corpus
def test_published_templates_give_the_texts_of_transformers(pair):
    ours, theirs = pair
    different, equal = [], 0
    published = sorted((CORPUS / "templates").glob("*.jinja"))
    for path in published:
        source = path.read_text("utf-8")
        for name, (talk, options) in TALKS.items():
            expected = _expected(theirs, source, talk, options)
            equal += expected != "refused"
            if _texts(ours, source, talk, options) != expected:
                different.append(f"{path.name}: {name}")
    assert not different
    assert equal > 6 * len(published)


def test_a_function_has_the_schema_of_transformers():
    assert describe_function(weather) == get_json_schema(weather)
    method = SimpleNamespace(f=Tools().weather).f
    assert describe_function(method) == get_json_schema(method)


def test_images_and_sounds_are_known_without_their_libraries_being_imported_here():
    import PIL.Image
    import torch

    image_of.__annotations__.update(picture=PIL.Image.Image, sound=torch.Tensor)
    assert describe_function(image_of) == get_json_schema(image_of)


def _without_hint(a):
    """A.

    Args:
        a: A
    """


def _without_text(a: int):
    """A."""


def _of_a_class(a: Path):
    """A.

    Args:
        a: A
    """


def _of_a_name(a: "Nothing"):  # type: ignore[name-defined]  # noqa: F821, UP037
    """A."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [lambda: 1]}, "it has no docstring"),
        ({"tools": [_without_hint]}, "function _without_hint.* parameter a has no type hint"),
        ({"tools": [_without_text]}, "docstring does not describe the parameter a"),
        ({"tools": [_of_a_class]}, r"Path'> has no JSON schema"),
        ({"tools": [_of_a_name]}, "name 'Nothing' is not defined"),
        ({"tools": ["add"]}, "A tool is a JSON schema, or a Python function .* this is 'add'"),
        ({"tools": TOOL}, "tools is a list; this is {'type'"),
        ({"documents": ["text"]}, "A document is a mapping"),
        ({"messages": []}, "at least one message"),
        ({"messages": "Hello"}, "A conversation is a list of messages"),
        ({"messages": ["Hello"]}, "A message is a mapping"),
        ({"chat_template": "nosuch"}, "no chat template 'nosuch'; give chat_template one of: default, tool_use"),
        ({"chat_template": "{% set ns = namespace() %}{% set ns._x = 1 %}"}, "given refused .* underscore"),
        ({"continue_final_message": "reasoning"}, 'has no "reasoning" to go on with'),
    ],
)
def test_what_is_no_conversation_is_explained(named, options, message):
    with pytest.raises(InputError, match=message):
        named[0].apply_chat_template(**{"messages": HELLO, **options})


def test_a_conversation_that_holds_itself_is_refused(named):
    talk = [{"role": "user", "content": []}]
    talk[0]["content"].append(talk)
    with pytest.raises(InputError, match="hold themselves"):
        named[0].apply_chat_template(talk)


@pytest.fixture(params=["files", "list"])
def named(request, pair, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(pair[0].path)
    theirs.chat_template = {"default": "plain {{ messages[0].content }}", "tool_use": "{{ tools | length }} tools"}
    theirs.save_pretrained(tmp_path, save_jinja_files=request.param == "files")
    return Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"tools": [TOOL]}, {"tools": []}, {"chat_template": "tool_use", "tools": [TOOL]}]
)
def test_templates_have_names(named, options):
    ours, theirs = named
    assert ours.apply_chat_template(HELLO, **options) == theirs.apply_chat_template(HELLO, tokenize=False, **options)


def test_files_of_templates_replace_what_the_configuration_holds(named, tmp_path):
    (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("rag")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no default"):
        theirs.apply_chat_template(HELLO)
    with pytest.raises(InputError, match="no chat template 'default'; give chat_template one of: rag"):
        Tokenizer(tmp_path).apply_chat_template(HELLO)


def test_several_conversations_are_several_texts(pair):
    ours, theirs = pair
    talks = [HELLO, SimpleNamespace(messages=TALKS["turns"][0])]
    template = TEMPLATES["stripped"]
    expected = theirs.apply_chat_template(talks, chat_template=template, tokenize=False)
    assert ours.apply_chat_template(talks, chat_template=template) == expected


def test_what_transformers_makes_of_the_text_can_be_asked_for(pair):
    ours, theirs = pair
    asked = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "return_tensors": "np"}
    expected = theirs.apply_chat_template(HELLO, return_dict=True, **asked)
    for options in ({}, {"return_dict": True}, {"tokenize": True, "padding": True}):
        found = ours.apply_chat_template(HELLO, **{**asked, **options})
        assert all(np.array_equal(found[name], expected[name]) for name in ("input_ids", "attention_mask"))
    ids = ours.apply_chat_template(HELLO, **asked, return_dict=False)
    assert np.array_equal(ids, expected["input_ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 5}, "takes no max_length=5"),
        ({"truncation": True}, r"takes no truncation=True.*tokenizer\(prompt, add_special_tokens=False"),
        ({"return_assistant_tokens_mask": True}, "takes no return_assistant_tokens_mask=True"),
        ({"conversation": HELLO}, "takes no conversation=.*The conversation comes first"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "give one"),
    ],
)
def test_options_that_are_not_for_the_template_do_not_reach_it(pair, options, message):
    with pytest.raises(UsageError, match=message):
        pair[0].apply_chat_template(HELLO, chat_template="{{ messages }}", **options)


def test_a_pipeline_goes_on_with_the_last_text_of_a_message():
    talk = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "It "}, {"type": "image"}]}]
    assert _full_text(talk, "is", None)[-1]["content"] == [{"type": "text", "text": "It is"}, {"type": "image"}]
