"""Response templates for checkpoints that carry none, by families that are known by their chat templates."""

from __future__ import annotations

from functools import cache
from typing import Any

from .response_template import ResponseTemplate

__all__ = ["ENDS", "family_of", "spec_of", "template_of"]

Spec = dict[str, Any]

_ANCHORS = ["<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|start|>assistant",
            "<|header_start|>assistant<|header_end|>\n\n", "<｜Assistant｜>", "[/INST]", "<|turn>model\n",
            "<start_of_turn>model\n", "<|assistant|>"]  # fmt: skip
"""Where an answer begins, in any of the families."""
ENDS = (r"<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<\|eot\|>|<\|eom\|>|</s>|<｜end▁of▁sentence｜>|<end_of_turn>|<turn\|>|"
         r"<\|endoftext\|>|<\|return\|>|<\|end\|>|<\|end_of_text\|>")  # fmt: skip
"""What ends an answer, in any of them: a pattern."""
_CONTENT: Spec = {"close_pattern": ENDS, "repeats": True, "join": "\n"}
_THINK: Spec = {"open": "<think>", "close": "</think>"}
_CALL = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}}
_PARAMETERS_CALL = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.parameters}"}}
_NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_EACH_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}


def _calls(**field: Any) -> Spec:
    return {"repeats": True, "content": "json", **field}


_TAGGED = {"open": "<tool_call>", "close": "</tool_call>"}
_LLAMA_END = r"<\|eo[tm](_id)?\|>|\Z"
_FAMILIES: dict[str, tuple[tuple[str, ...], Spec]] = {
    "gpt-oss": (("<|start|>assistant", "<|channel|>"), {
        "reasoning_content": {"open": "<|channel|>analysis<|message|>", "close_pattern": r"<\|end\|>|\Z",
                              "repeats": True, "join": "\n"},
        "tool_calls": _calls(
            # The function is named behind the channel or before it.
            open_pattern=r"(?:<\|channel\|>commentary)? to=functions\.(?P<name>[\w.-]++)(?:<\|channel\|>commentary)?"
                         r"[^<]*+(?:<\|constrain\|>\w++)?<\|message\|>",
            close_pattern=r"<\|call\|>|<\|end\|>|\Z", transform=_NAMED_CALL),
        "content": {
            "open_pattern": r"<\|channel\|>(?:final|commentary) ?+(?:<\|constrain\|>\w++)?<\|message\|>",
            "close_pattern": rf"{ENDS}|\Z", "repeats": True, "join": "\n"},
    }),
    "gemma-4": (("<|tool_call>", "<tool_call|>"), {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": _calls(
            open_pattern=r"<\|tool_call>call:(?P<name>[\w.-]+)", close="<tool_call|>", transform=_NAMED_CALL,
            content_args={"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}),
    }),
    "function-gemma": (("<start_function_call>",), {
        "tool_calls": _calls(
            open_pattern=r"<start_function_call>call:(?P<name>[\w.-]+)", close="<end_function_call>",
            transform=_NAMED_CALL, content_args={"unquoted_keys": True, "string_delims": [["<escape>", "<escape>"]]}),
    }),
    "deepseek-v3": (("<｜tool▁sep｜>", "```json"), {
        "reasoning_content": _THINK,
        "tool_calls": _calls(
            open_pattern=r"(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>\w+<｜tool▁sep｜>(?P<name>[\w.-]+)\s*```json",
            close_pattern=r"```\s*<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?", transform=_NAMED_CALL),
    }),
    "deepseek-v3.1": (("<｜tool▁sep｜>",), {
        "reasoning_content": _THINK,
        "tool_calls": _calls(
            open_pattern=r"(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?P<name>[\w.-]+)<｜tool▁sep｜>",
            close_pattern=r"<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?", transform=_NAMED_CALL),
    }),
    "mistral": (("[TOOL_CALLS]", "[ARGS]"), {
        "reasoning_content": {"open": "[THINK]", "close": "[/THINK]"},
        "tool_calls": _calls(
            open_pattern=r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
            close_pattern=r"(?=\[TOOL_CALLS\])|</s>|\Z", transform=_NAMED_CALL),
    }),
    "mistral-list": (("[TOOL_CALLS]",), {
        "reasoning_content": {"open": "[THINK]", "close": "[/THINK]"},
        "tool_calls": {"open_pattern": r"\[TOOL_CALLS\]\s*", "close_pattern": r"</s>|\Z", "content": "json",
                       "transform": _EACH_CALL, "transform_each": True},
    }),
    "qwen3-coder": (("<tool_call>", "<function="), {
        "reasoning_content": _THINK,
        "tool_calls": _calls(
            open_pattern=r"<tool_call>\s*<function=(?P<name>[^>\s]+)>", close_pattern=r"</function>\s*</tool_call>",
            content="xml-inline", transform=_NAMED_CALL,
            content_args={"tag_pattern": r"<parameter=(?P<key>[^>\s]+)>\n?(?P<value>.*?)\n?</parameter>"}),
    }),
    "glm": (("<tool_call>", "<arg_key>"), {
        "reasoning_content": _THINK,
        "tool_calls": _calls(
            open_pattern=r"<tool_call>\s*(?P<name>[^\s<]+)", close="</tool_call>", content="xml-inline",
            transform=_NAMED_CALL,
            content_args={"tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"}),
    }),
    "hermes": (("<tool_call>",), {
        "reasoning_content": _THINK,
        "tool_calls": _calls(**_TAGGED, transform=_CALL),
    }),
    "llama-pythonic": (("func_name1(",), {
        "tool_calls": {
            "open_pattern": r"\A\s*+(?:<\|python_(?:tag|start)\|>\s*+)?(?=\[\s*+[A-Za-z_][\w.-]*+\()",
            "close_pattern": rf"<\|python_end\|>|{_LLAMA_END}", "content": "python-call-list",
            "transform": _EACH_CALL, "transform_each": True},
    }),
    "llama-3": (("<|start_header_id|>", "ipython"), {
        "tool_calls": _calls(
            open_pattern=r'\A\s*+(?:<\|python_tag\|>\s*+)?(?=\{\s*+"(?:name|type)")|<\|python_tag\|>(?=\s*+\{)',
            close_pattern=_LLAMA_END,
            transform=_PARAMETERS_CALL),
    }),
    "thinking": (("<think>",), {"reasoning_content": _THINK}),
    "plain": ((), {}),
}  # fmt: skip
"""What is in the chat template of each family, and its fields; the first whose marks are all there counts."""


def family_of(chat_template: str) -> str:
    """The family that a chat template belongs to, "plain" where its answers are text alone."""
    return next(name for name, (marks, _) in _FAMILIES.items() if all(mark in chat_template for mark in marks))


@cache
def template_of(family: str) -> ResponseTemplate:
    """The response template of a family, whose prompts may begin answers in another way than the anchors."""
    return ResponseTemplate(spec_of(family), may_lack_anchor=True)


def spec_of(family: str) -> Spec:
    """The same as transformers has templates."""
    _, fields = _FAMILIES[family]
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor": _ANCHORS,
        "fields": {"content": _CONTENT, **fields},
    }
