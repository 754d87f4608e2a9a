"""Chat models' answers taken apart: as transformers does by the same template, and by families' own."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from corpus import CORPUS, needs_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response as theirs

from precast.runtime import CompiledModelForCausalLM, Tokenizer, pipeline
from precast.runtime.errors import FormatError, InputError
from precast.runtime.inputs import response_families as families
from precast.runtime.inputs.chat_responses import parse_answers
from precast.runtime.inputs.response_template import ResponseTemplate

CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}
JSON_CALL = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'
LISTED = '[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]'
ARGUMENTS = '{"city": "Paris", "days": 2}'
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Which."},
                "days": {"type": "integer", "description": "How many."},
            },
            "required": ["city"],
        },
    },
}


def assert_read_alike(spec: dict[str, Any], answer: str, prefix: str) -> None:
    """By transformers and here: the same message, or refused by both."""
    try:
        expected: Any = theirs(answer, spec, prefix=prefix)
    except (ValueError, KeyError):
        expected = None
    try:
        found: Any = ResponseTemplate(spec).parse(answer, prefix)
    except ValueError:
        found = None
    assert found == expected, (answer, prefix)


# Family, what the prompt ends with, the answer, and what is in it besides the call.
ANSWERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("hermes", "<|im_start|>assistant\n", f"<tool_call>\n{JSON_CALL}\n</tool_call><|im_end|>\n", {}),
    ("hermes", "", f"<think>\nHm.\n</think>\n\nLet me see.\n<tool_call>\n{JSON_CALL}\n</tool_call><|im_end|>",
     {"reasoning_content": "Hm.", "content": "Let me see."}),
    ("hermes", "<|im_start|>assistant\n<think>\n", f"Hm.</think><tool_call>{JSON_CALL}</tool_call>",
     {"reasoning_content": "Hm."}),
    ("llama-3", "<|start_header_id|>assistant<|end_header_id|>\n\n",
     JSON_CALL.replace("arguments", "parameters") + "<|eot_id|>", {}),
    ("llama-3", "", "<|python_tag|>" + JSON_CALL.replace("arguments", "parameters") + "<|eom_id|>", {}),
    ("llama-pythonic", "", '[get_weather(city="Paris", days=2)]<|eot_id|>', {}),
    ("mistral-list", "[INST] Hello[/INST]", f"[TOOL_CALLS]{LISTED}</s>", {}),
    ("mistral-list", "", f"[TOOL_CALLS] {LISTED}", {}),
    ("mistral", "", f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}</s>", {}),
    ("mistral", "", f"[THINK]Hm.[/THINK]Well.[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{ARGUMENTS}",
     {"reasoning_content": "Hm.", "content": "Well."}),
    ("function-gemma", "",
     "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>", {}),
    ("gemma-4", "", '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>', {}),
    ("deepseek-v3", "<｜Assistant｜>",
     "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + ARGUMENTS
     + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>", {}),
    ("deepseek-v3.1", "<｜Assistant｜><think>", "Hm.</think>Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather"
     "<｜tool▁sep｜>" + ARGUMENTS + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
     {"reasoning_content": "Hm.", "content": "Well."}),
    ("qwen3-coder", "", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
     "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>", {}),
    ("glm", "", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
     "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>", {}),
    ("gpt-oss", "<|start|>assistant", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
     "to=functions.get_weather <|constrain|>json<|message|>" + ARGUMENTS + "<|call|>", {"reasoning_content": "Hm."}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "prefix", "answer", "besides"), ANSWERS, ids=[each[0] for each in ANSWERS])
def test_a_call_of_each_family(family, prefix, answer, besides):
    """And of two calls in a row both are there; as transformers reads them by the same template."""
    template = families.template_of(family)
    (found,) = parse_answers(template, [answer], [prefix], [TOOL])
    assert found == {"role": "assistant", "content": "", "tool_calls": [CALL], **besides}
    expected = theirs(answer, families.spec_of(family), prefix=prefix, tools=[TOOL])
    assert {**expected, "content": expected["content"].strip()} == found


PLAIN = [
    ("hermes", "", "Hello.<|im_end|>", {"content": "Hello."}),
    ("hermes", "", "<think>\n\n</think>\n\nHello.", {"content": "Hello."}),
    ("thinking", "<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nHello.",
     {"content": "Hello.", "reasoning_content": "Hm."}),
    ("thinking", "<think>", "Hm, and so on", {"reasoning_content": "Hm, and so on", "content": ""}),
    ("llama-3", "", 'Write {"name": "x"} then.<|eot_id|>', {"content": 'Write {"name": "x"} then.'}),
    ("plain", "", "Hello.</s>", {"content": "Hello."}),
    ("gpt-oss", "<|start|>assistant", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
     "<|message|>Hello.<|return|>", {"content": "Hello.", "reasoning_content": "Hm."}),
    ("gpt-oss", "<|start|>assistant", '<|channel|>final <|constrain|>JSON<|message|>{"a":1}<|return|>',
     {"content": '{"a":1}'}),
    ("gpt-oss", "", "<|channel|>analysis<|message|>One.<|end|><|channel|>analysis<|message|>Two.<|end|>",
     {"content": "", "reasoning_content": "One.\nTwo."}),
    ("gpt-oss", "", "Hello without a channel.", {"content": "Hello without a channel."}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "prefix", "answer", "expected"), PLAIN, ids=range(len(PLAIN)))
def test_answers_without_calls(family, prefix, answer, expected):
    (found,) = parse_answers(families.template_of(family), [answer], [prefix], None)
    assert found == {"role": "assistant", **expected}


MALFORMED = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "argum'),
    ("hermes", "<tool_call>\n[1, 2]\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    ("llama-3", '{"name": "get_weather", "parameters": {"city": <|eot_id|>'),
    ("llama-pythonic", "[get_weather(Paris)]<|eot_id|>"),
    ("llama-pythonic", "[get_weather(city=__import__('os').getcwd())]"),
    ("llama-pythonic", "[get_weather(city=" + "(" * 5000 + ")]"),
    ("mistral-list", "[TOOL_CALLS]get_weather(1)"),
    ("mistral", "[TOOL_CALLS]get_weather[ARGS]{city: Paris}"),
    ("deepseek-v3.1", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{<｜tool▁call▁end｜>"),
]


@pytest.mark.parametrize(("family", "answer"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_call_is_text(family, answer):
    """And no error: a model may write anything."""
    (found,) = parse_answers(families.template_of(family), [answer], [""], [TOOL])
    assert found == {"role": "assistant", "content": answer.removesuffix("<|eot_id|>").strip()}


_WORDS = [
    "Hello ",
    "\n",
    "{",
    "}",
    '"',
    "7",
    ": ",
    ", ",
    '"name"',
    '"arguments"',
    JSON_CALL,
    LISTED,
    ARGUMENTS,
    "[f(a=1)]",
]
_MARKS = {
    mark
    for _, prefix, answer, _ in [*ANSWERS, *PLAIN]
    for mark in (*families._ANCHORS, "<|im_end|>", "</s>", "<tool_call>", "</tool_call>", "<think>", "</think>")
    if mark in answer or mark in prefix
}
_parts = st.lists(st.sampled_from([*_WORDS, *sorted(_MARKS), *(each[2] for each in ANSWERS)]), max_size=7).map("".join)


@settings(max_examples=300, deadline=None)
@given(family=st.sampled_from(sorted(families._FAMILIES)), prefix=_parts, answer=_parts)
def test_whatever_an_answer_is_it_is_read_as_transformers_reads_it(family, prefix, answer):
    assert_read_alike(families.spec_of(family), answer, prefix)


SPECS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"start_anchor": "A:", "fields": {
            "thinking": {"open": ["<t>", "<think>"], "close_pattern": "</t(hink)?>"},
            "facts": {"open": "<kv>", "close": "</kv>", "content": "kv-lines"},
            "count": {"open": "<n>", "close": "</n>", "content": "int"},
            "share": {"open": "<s>", "close": "</s>", "content": "float", "repeats": True},
            "is_done": {"open": "<b>", "close": "</b>", "content": "bool"},
            "content": {}}},
        ["A: x <t>hm</t>well<kv>a: 1\nb : c:d\nnothing</kv><n> 7 </n><s>1.5</s><s>2</s><b>True</b>",
         "<think>a</think>b", "<n>x</n>", "<kv></kv>", ""],
    ),
    (
        {"start_anchor_pattern": "A+:", "defaults": {"role": "assistant", "content": None}, "fields": {
            "calls": {"open_pattern": r"call (?P<name>\w+)\(", "close": ")", "content": "xml-inline", "repeats": True,
                      "content_args": {"tag_pattern": "<(?P<key>\\w+)>(?P<value>.*?)</(?P=key)>",
                                       "merge_duplicates": True,
                                       "value_parser": {"name": "json", "args": {"allow_non_json": True}}},
                      "transform": {"name": "{name}", "with": "{content}", "fixed": 1}}}},
        ["call f(<a>1</a><b>x</b><a>[2]</a><a>3</a>)call g()", "call f(<a>1</a>", "nothing"],
    ),
    (
        {"start_anchor": "A:", "fields": {
            "lax": {"open": "<j>", "close": "</j>", "content": "json", "optional": False,
                    "content_args": {"unquoted_keys": True, "string_delims": [["<q>", "</q>"]]}}}},
        ['<j>{a: 1, "b": "c: {d: e}", f : <q>say "hi"</q>}</j>', "<j>{a:}</j>", "none", "<j>{<q>k</q>: 1}</j>"],
    ),
    (
        {"start_anchor": "A:", "fields": {
            "calls": {"open_pattern": r"(?=\[)", "close_pattern": r"$", "content": "python-call-list",
                      "transform_each": True,
                      "transform": {"function": {"name": "{name}", "arguments": "{arguments}"}}}}},
        ['[f(a=1, b="x", c=[True, None, -2.5], d={"k": false}), g.h()]', "[f(1)]", "[f(a=b)]", "[f(a=1, a=2)]", "[]",
         "[f(a='it\\'s')]", "[f(a=1e400)]", "[f(a=9007199254740993)]", "[f(a=1)] and more", "f(a=1)"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "answers"), SPECS, ids=range(len(SPECS)))
def test_every_kind_of_field_is_transformers_own(spec, answers):
    for answer in answers:
        for prefix in ("", "A: before A:", "A: <t>"):
            assert_read_alike(spec, answer, prefix)


BAD: list[tuple[Any, str]] = [
    ([], "object of version 1"),
    ({"version": 2}, "version 1"),
    ({"fields": {}}, "must hold .fields."),
    ({"fields": {"a": {}}}, "start_anchor"),
    ({"start_anchor": "A", "field": {}}, r"it has the keys \['field'\]"),
    ({"start_anchor": "A", "fields": {"a": {"opens": "x"}}}, r"field 'a' must be an object without \['opens'\]"),
    ({"start_anchor": "A", "fields": {"a": {"content": "yaml"}}}, "written in 'yaml', not in one of text, int"),
    ({"start_anchor": "A", "fields": {"a": {"open": "x", "open_pattern": "y"}}}, "exclude each other"),
    ({"start_anchor": "A", "fields": {"a": {"open_pattern": "("}}}, "no response template"),
    ({"start_anchor": "A", "fields": {"a": {}, "b": {}}}, "more than one field"),
    ({"start_anchor": [], "fields": {"a": {}}}, "must be a text or a list"),
    ({"start_anchor": "A", "fields": {"a": {"join": ""}}}, "joined and does not repeat"),
]


@pytest.mark.parametrize(("spec", "message"), BAD, ids=range(len(BAD)))
def test_templates_that_are_none(spec, message):
    with pytest.raises(FormatError, match=message):
        ResponseTemplate(spec)


@pytest.mark.parametrize(
    "field",
    [
        {"content": "json", "content_args": "abc"},
        {"content": "xml-inline", "content_args": {"tag_pattern": "("}},
        {"content": "xml-inline", "content_args": {"tag_pattern": "<a>"}},
        {"content": "xml-inline", "content_args": {"tag_pattern": "(?P<key>.)", "value_parser": "int"}},
        {"repeats": True},
    ],
)
def test_fields_that_do_not_fit_an_answer_leave_it_as_it_is(field):
    spec = {"start_anchor": "A", "defaults": {"a": "text"}, "fields": {"a": {"open": "<", "close": ">", **field}}}
    assert parse_answers(ResponseTemplate(spec), ["<a>"], [""], None) == [{"role": "assistant", "content": "<a>"}]


def test_delimiters_of_no_length_come_to_an_end():
    spec = {"start_anchor": "A", "fields": {"a": {"open_pattern": "(?=x)", "close_pattern": "(?=x)"}, "b": {}}}
    assert isinstance(parse_answers(ResponseTemplate(spec), ["axb"], [""], None), list)


@pytest.mark.parametrize("text", ["\n" * 200_000, " to=functions." + "a" * 200_000, "{" * 200_000, "<think>" * 30_000])
@pytest.mark.parametrize("family", sorted(families._FAMILIES))
def test_what_a_model_repeats_for_ever_is_read_at_once(family, text):
    assert len(parse_answers(families.template_of(family), [text], [""], None)) == 1


def test_types_of_arguments_are_their_tools():
    """As transformers casts them, unions and lists included."""

    def tool(name: str, **properties: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    kinds = {
        "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"}, "s": {"type": "string"},
        "o": {"type": "object"}, "l": {"type": "array"}, "u": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "t": {"type": ["boolean", "string"]}, "z": {"type": "integer", "nullable": True}, "x": {},
    }  # fmt: skip
    texts = ["7", "7.0", "7.5", "x", "True", "0", "null", "None", "[1]", '{"a": 1}', "nan", "", "1e3"]
    spec = families.spec_of("qwen3-coder")
    for text in texts:
        body = "".join(f"<parameter={name}>{text}</parameter>" for name in kinds)
        answer = f"<tool_call><function=f>{body}</function></tool_call>"
        expected = theirs(answer, spec, prefix="", tools=[tool("f", **kinds)])
        (found,) = parse_answers(ResponseTemplate(spec), [answer], [""], [tool("f", **kinds)])
        assert found == expected, text


@pytest.fixture
def tokenizer(tmp_path):
    def make(chat_template: str = "<tool_call>", **config: Any) -> Tokenizer:
        made = tiny.tokenizer()
        made.chat_template = chat_template
        made.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return Tokenizer(tmp_path)

    return make


def test_a_tokenizer_reads_texts_ids_and_lists(tokenizer):
    opened = tokenizer()
    answer, message = f"Well.<tool_call>{JSON_CALL}</tool_call>", {"role": "assistant", "content": "Well."}
    with_call = {**message, "tool_calls": [CALL]}
    assert opened.parse_response(answer, prefix="") == with_call
    assert opened.parse_response([answer, "Well."], prefix="") == [with_call, message]
    ids = opened.encode("Well.", add_special_tokens=False)
    for given_ in (ids, np.array(ids), torch.tensor(ids)):
        assert opened.parse_response(given_, prefix="") == message
    prompt = opened.encode("Hi<|im_start|>assistant\nWell.", add_special_tokens=False)
    assert opened.parse_response("!", prefix=prompt)["content"] == "Well.!"
    assert opened.parse_response(np.array([ids, ids]), prefix="") == [message, message]
    with pytest.raises(InputError, match=r"needs prefix=.*prefix=\"\""):
        opened.parse_response(answer)
    with pytest.raises(InputError, match="2 responses and 3 prefixes"):
        opened.parse_response(["a", "b"], prefix=["", "", ""])
    with pytest.raises(InputError, match="A tool is a function, or its JSON schema"):
        opened.parse_response(answer, prefix="", tools=[5])


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("USER: Hi ASSISTANT: ", "Hello", {"content": "Hello"}),
        ("USER: Hi ASSISTANT: <think>\n", "hm</think>Hello", {"content": "Hello", "reasoning_content": "hm"}),
        ("USER: <think>a</think> ASSISTANT: ", "Hello", {"content": "Hello"}),
        ("USER: <think>a</think> ASSISTANT: <think>", "b</think>", {"content": "", "reasoning_content": "b"}),
    ],
)
def test_a_prompt_that_begins_answers_in_a_way_of_its_own_is_no_part_of_them(tokenizer, prompt, answer, expected):
    found = tokenizer("<think>").parse_response(answer, prefix=prompt)
    assert {name: value.strip() for name, value in found.items()} == {"role": "assistant", **expected}


def test_the_checkpoints_own_template_goes_first(tokenizer):
    spec = {"start_anchor": "A:", "fields": {"thinking": {"open": "(", "close": ")"}, "content": {}}}
    assert tokenizer(response_template=spec).parse_response("(hm)well", prefix="") == {
        "thinking": "hm",
        "content": "well",
    }
    other = {"start_anchor": "A:", "fields": {"all": {}}}
    assert tokenizer(response_template=spec).parse_response("x", other, prefix="") == {"all": "x"}
    with pytest.raises(FormatError, match=r"response_template of .*tokenizer_config\.json is no response template"):
        tokenizer(response_template={"fields": {}}).parse_response("x", prefix="")


FOUND = {
    "Qwen-Qwen2.5-7B-Instruct": "hermes", "Qwen-Qwen3-0.6B": "hermes", "Qwen-QwQ-32B": "hermes",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes", "Qwen3-Coder": "qwen3-coder", "GLM-4.6": "glm",
    "meta-llama-Llama-3.1-8B-Instruct": "llama-3", "meta-llama-Llama-3.2-3B-Instruct": "llama-3",
    "vllm-tool_chat_template_llama3.2_pythonic": "llama-pythonic",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral-list", "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral", "google-gemma-4-31B-it": "gemma-4",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek-v3", "vllm-tool_chat_template_deepseekv3": "deepseek-v3",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1", "openai-gpt-oss-120b": "gpt-oss",
    "google-gemma-2-2b-it": "plain", "ct-zephyr": "plain",
}  # fmt: skip
# What has been written is shown otherwise in the next turn than the model writes it.
NOT_AS_WRITTEN = {"llama-pythonic", "deepseek-v3", "plain"}


@needs_corpus
@pytest.mark.parametrize(("name", "family"), FOUND.items(), ids=list(FOUND))
def test_published_templates_are_known_and_what_they_write_is_read(tokenizer, name, family):
    """Rendered as a turn of the past, a call is what the model is shown that calls are; so it is read back."""
    source = (CORPUS / "templates" / f"{name}.jinja").read_text("utf-8")
    assert families.family_of(source) == family
    if family in NOT_AS_WRITTEN:
        return
    opened = tokenizer(source)
    asked = [{"role": "user", "content": "How is the weather?"}]
    called = [{"role": "assistant", "content": "", "tool_calls": [{"id": "123456789", **CALL}]}]
    beside = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024"}
    prompt = opened.apply_chat_template(asked, tools=[TOOL], **beside)
    whole = opened.apply_chat_template([*asked, *called], tools=[TOOL], add_generation_prompt=False, **beside)
    common = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
    assert "get_weather" in whole[common:]
    found = opened.parse_response(whole[common:], prefix=prompt[:common], tools=[TOOL])
    assert found["tool_calls"] == [CALL]


def test_a_pipeline_answers_with_the_parts_of_the_message(checkpoint, artifact, tmp_path):
    """As transformers' does, where the checkpoint has a response template; rows of a batch are filled up with ends."""
    source = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), source)
    made = tiny.tokenizer()
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    made.response_template = {
        "start_anchor": "assistant:", "defaults": {"role": "assistant"},
        "fields": {"first": {"open_pattern": "(?=.)", "close_pattern": r"(?<=\w)\W"}, "content": {}},
    }  # fmt: skip
    made.save_pretrained(source)
    talk = [{"role": "user", "content": "How is the water?"}]
    ours = pipeline("text-generation", CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=2)))
    theirs_ = transformers.pipeline("text-generation", model=str(source), device="cpu")
    asked = {"max_new_tokens": 9, "do_sample": False}
    assert ours(talk, **asked) == theirs_(talk, **asked)
    assert "first" in ours(talk, **asked)[0]["generated_text"][-1]
    other = [{"role": "user", "content": "And now?"}]
    ends = {"eos_token_id": [*range(3, 320, 4)], "pad_token_id": 2}
    for answer, alone in zip(ours([talk, other], **asked, **ends), ([talk], [other]), strict=True):
        (expected,) = ours(alone, **asked, **ends)
        assert answer == expected
