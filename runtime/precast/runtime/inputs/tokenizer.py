"""Text <-> token ids with the `tokenizers` library, chat templates with jinja2; no transformers.

Everything is read from the checkpoint's `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import tokenizers

from ..arguments import only_known
from ..artifact.published_json import parse_object, select
from ..errors import ArtifactError, FormatError, InputError, OutOfMemoryError, PrecastError, UsageError
from .character_maps import check_character_maps
from .chat_responses import parse_answers
from .chat_templates import Conversation, is_batch, render_chat
from .companions import Readable, companions_at
from .response_families import family_of, template_of
from .response_template import ResponseTemplate
from .tensors import as_tensors, to_python

__all__ = ["TextStream", "Tokenizer", "listed_texts"]

Array = np.ndarray[Any, Any]
_REPLACEMENT = "\ufffd"
_MORE_TEMPLATES = "additional_chat_templates"
_STRATEGIES = ("longest_first", "only_first", "only_second")
_LARGEST = 2**32 - 1
"""Ids are numbers of 32 bits."""


class _OwnVocabulary(msgspec.Struct):
    """The vocabulary of a tokenizer whose pieces are sentencepiece's and whose ids are not: see _OwnIds. The `end` of a
    text is added where it has none yet."""

    size: int
    unknown: int
    mark: str
    end: str | None = None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "padding": (False, True, "longest", "do_not_pad"),
    "truncation": (False, "do_not_truncate"),
    "max_length": (),
    "tokenizer_kwargs": ({},),
    "return_assistant_tokens_mask": (False,),
    "sanitize_control_tokens": (False,),
    "conversation": (),
}
"""Arguments of transformers' apply_chat_template that are not for the template, and values that change nothing here."""

_Token = str | dict[str, Any]
_CLEANS_PAIRS = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_TYPES: dict[str, Any] = {
    "padding_side": Literal["left", "right"],
    "truncation_side": Literal["left", "right"],
    "model_max_length": int | float,
    "model_input_names": list[str],
    "pad_token_type_id": int,
    "split_special_tokens": bool,
    "clean_up_tokenization_spaces": bool,
    _CLEANS_PAIRS: bool,
    "chat_template": str | list[_NamedTemplate],
    "response_template": dict[str, Any],
    "own_vocabulary": _OwnVocabulary,
    **dict.fromkeys([f"{role}_token" for role in _ROLES], _Token),
}
"""The keys that are read of tokenizer_config.json, with their types; the export put the others into tokenizer.json."""


class Tokenizer:
    """The tokenizer of an artifact, or of another directory with a tokenizer.json. Raises ArtifactError where there is
    none.

    `files` are read instead of what lies at `path`: the companions of an opened artifact, say. `names` are the arrays
    that its model takes, where that is known; no others are made.
    """

    def __init__(self, path: str | Path, files: Readable | None = None, *, names: Sequence[str] | None = None) -> None:
        self.path, self._names = Path(path), names
        self._files = files or companions_at(self.path)
        data = self._files.get("tokenizer.json")
        if data is None:
            raise ArtifactError(
                f"{self.path} has no tokenizer.json: its checkpoint carries no tokenizer, or one that only "
                f"transformers runs. Give token ids instead of text."
            )
        check_character_maps(data, str(self.path / "tokenizer.json"))
        with _calling_the_library(f"{self.path / 'tokenizer.json'} cannot be read as a tokenizer", FormatError):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        self._data = data
        # The file may fix a length of its own; here the compiled model decides.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = self._read_json("tokenizer_config.json")
        self._config = select(config, _TYPES, str(self.path / "tokenizer_config.json"))
        self.special_tokens = _special_tokens({**self._read_json("special_tokens_map.json"), **config}, self.path)
        self.padding_side = self._config.get("padding_side", "right")
        # Special tokens that texts spell out are text like any other.
        self._tokenizer.encode_special_tokens = self._config.get("split_special_tokens", False)
        self._truncating = lru_cache(maxsize=4)(self._copy_with_truncation)

    @property
    def max_length(self) -> int | None:
        """The most tokens that the checkpoint's tokenizer_config.json allows; None where it names no limit."""
        found = self._config.get("model_max_length")
        # transformers writes 10**30 where there is no limit.
        return int(found) if found is not None and 0 < found < _LARGEST else None

    def token_id(self, name: str) -> int | None:
        """The id of a special token by its role: "bos", "eos", "pad", "unk", "cls", "sep", "mask"."""
        token = self.special_tokens.get(f"{name}_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    @only_known
    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, or of a pair of texts."""
        return list(self._encode_text(text, pair, add_special_tokens).ids)

    @only_known
    def decode(self, ids: Sequence[int] | Array, *, skip_special_tokens: bool = True) -> str:
        """The text of a list of ids. Raises InputError for what is no id."""
        numbers = _as_ids(ids)
        with self._library_errors("decode these ids"):
            text = str(self._tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens))
        return _clean_spaces(text) if self._cleans_up else text

    @only_known
    def batch_decode(self, rows: Sequence[Sequence[int]] | Array, *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each row of ids, such as those that `generate` answers; a tensor of torch is taken, too."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def token(self, index: int) -> str | None:
        """The token with this id, as the vocabulary spells it."""
        return self._spelled([index])[0]

    def _spelled(self, ids: Sequence[int]) -> list[str | None]:
        found: list[str | None] = [self._tokenizer.id_to_token(number) for number in _as_ids(ids)]
        own = self._config.get("own_vocabulary")
        return found if own is None else [each and each.removeprefix(own.mark) for each in found]

    def vocabulary_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        own = self._config.get("own_vocabulary")
        found: int | None = self._tokenizer.token_to_id(_check_text(token))
        return found if found is not None or own is None else self._tokenizer.token_to_id(own.mark + token)

    @property
    def added_tokens(self) -> dict[str, int]:
        """The ids of the tokens that were added to the vocabulary, by their text: special ones, languages."""
        return {token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items()}

    @property
    def special_ids(self) -> set[int]:
        """The ids of special tokens, which are no text."""
        return {index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    @property
    def marks_subwords(self) -> bool:
        """Whether tokens inside a word are spelled differently from those that begin one, as in WordPiece."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens as the vocabulary spells them."""
        with self._library_errors("join these tokens"):
            return self._join(tokens)

    def _join(self, tokens: Sequence[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def piece(self, index: int) -> bytes | None:
        """The bytes of one token, as `pieces` has them."""
        return self.pieces([index])[0]

    def pieces(self, ids: Sequence[int]) -> list[bytes | None]:
        """The bytes that each of these tokens adds to the text before it, perhaps part of a character; None for an
        unknown id."""
        # Once for all: a vocabulary has hundreds of thousands.
        with self._library_errors("join these tokens"):
            return [None if token is None else self._piece_of(token) for token in self._spelled(ids)]

    def _piece_of(self, token: str) -> bytes:
        # As in transformers: the decoder decides, but where it joins bytes to characters.
        if self._byte_tokens == "ByteLevel" and _BYTES.keys() >= {*token}:
            return bytes(map(_BYTES.__getitem__, token))
        if self._byte_tokens == "ByteFallback" and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(found[1])
        before, length = self._sample_tokens
        return self._join([*before, token])[length:].encode()

    def encodings(
        self,
        text: str,
        pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        length: int | None = None,
        stride: int = 0,
        strategy: str = "longest_first",
    ) -> list[tokenizers.Encoding]:
        """The encoding of a text, or of a pair of texts: ids, offsets in characters, which text and word each is of.

        With `length`, what has more tokens is cut; further encodings hold the rest, and begin with the last `stride`
        tokens of the one before. `strategy` says which of a pair is cut: "longest_first", "only_first", "only_second".

        Raises InputError where nothing is left to cut.
        """
        if length is None:
            return [self._encode_text(text, pair, add_special_tokens)]
        self._check_truncation(length, stride, strategy, pair is not None)
        _check_pair(text, pair)
        with self._library_errors(f"cut a text to {length} tokens with an overlap of {stride}"):
            cutting = self._truncating(length, stride, strategy)
            whole = cutting.encode(
                *self._strip_ends(text, pair, add_special_tokens), add_special_tokens=add_special_tokens
            )
        return [self._with_own_ids(each) for each in (whole, *whole.overflowing)]

    def pad(self, encodings: Sequence[tokenizers.Encoding]) -> dict[str, Array]:
        """A batch of encodings: int64 arrays [batch, longest], padded on the tokenizer's own side; all three, or those
        that the checkpoint's tokenizer_config.json names, and the model takes."""
        pad = self.token_id("pad") or 0
        rows = {
            "input_ids": ([each.ids for each in encodings], pad),
            "token_type_ids": ([each.type_ids for each in encodings], self._config.get("pad_token_type_id", 0)),
            "attention_mask": ([[1] * len(each.ids) for each in encodings], 0),
        }
        named = {"input_ids", *self._config.get("model_input_names", rows)}.intersection(self._names or rows)
        return {name: self._pad_rows(values, fill) for name, (values, fill) in rows.items() if name in named}

    @only_known
    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """A batch: int64 arrays [batch, longest], padded on the tokenizer's own side.

        `return_tensors="pt"` makes tensors of torch, "np" is the same as None. Raises UsageError for anything else.
        """
        first = listed_texts(texts)
        second = [None] * len(first) if pairs is None else listed_texts(pairs)
        if len(second) != len(first):
            raise InputError(f"There are {len(first)} texts and {len(second)} pairs; each text takes one.")
        encodings = [
            self._encode_text(text, pair, add_special_tokens) for text, pair in zip(first, second, strict=True)
        ]
        return as_tensors(self.pad(encodings), return_tensors)

    def offsets(self, text: str, pair: str | None = None) -> list[tuple[int, int]]:
        """For every token of `encode`, its place in the text: (first character, one past the last)."""
        return list(self._encode_text(text, pair, True).offsets)

    def sequence_ids(self, text: str, pair: str | None = None) -> list[int | None]:
        """For every token of `encode`, 0 or 1 for the text it belongs to, None for special tokens."""
        return list(self._encode_text(text, pair, True).sequence_ids)

    def apply_chat_template(
        self,
        messages: Any = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        *,
        tokenize: bool | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        **variables: Any,
    ) -> Any:
        """The prompt of a conversation, or of each of a list of them, as transformers' `apply_chat_template` writes it.

        A text, unless `tokenize=True`, `return_tensors` or `return_dict` asks for what the tokenizer makes of it.

        Args:
            messages: each a mapping {"role": …, "content": …}, a dataclass or a pydantic model.
            tools: JSON schemas, or Python functions with type hints and a docstring in Google's style.
            documents: mappings, with "title" and "text" as a rule.
            chat_template: a template, or the name of one of the checkpoint's; otherwise "tool_use" where there are
                tools and such a template, else the default one.
            add_generation_prompt: whether the answer begins after it; by default it does, unless the last message is
                continued.
            continue_final_message: the answer goes on with the last message; True for its "content", or another key.
            return_dict: False for the token ids alone, int64 [batch, longest].
            variables: whatever else the template may read.

        Raises InputError where there is no template, or it refuses or fails; UsageError for arguments that exclude each
        other, and for those of transformers that have no effect here.
        """
        _check_chat_options(variables, add_generation_prompt, continue_final_message)
        source, name = self._choose_template(chat_template, tools is not None)
        talks = list(messages) if is_batch(messages) else [messages]
        prompt = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        beside = {**self.special_tokens, **variables}
        texts = [
            render_chat(source, name, Conversation(each, tools, documents, prompt, continue_final_message, beside))
            for each in talks
        ]
        if not (tokenize or return_tensors or return_dict) or tokenize is False:
            return texts if is_batch(messages) else texts[0]
        batch = self(texts, add_special_tokens=False, return_tensors=return_tensors)
        return batch["input_ids"] if return_dict is False else batch

    @only_known
    def parse_response(
        self,
        response: Any,
        schema: Any = None,
        *,
        prefix: Any = None,
        tools: Sequence[Any] | None = None,
    ) -> Any:
        """The message in a chat model's answer: {"role", "content", "reasoning_content", "tool_calls", …}.

        By the checkpoint's own response template where it has one, as transformers' method of this name does, else by
        that of the family that its chat template belongs to (Hermes and Qwen, Llama 3, Mistral, Gemma, DeepSeek, GLM,
        gpt-oss). An answer that is not written as it should be, such as a call that was cut off, is all content.

        Args:
            response: what the model generated and nothing else: a text with its special tokens, or token ids; or a list
                of these, or ids [batch, new], for a list of messages.
            schema: another response template.
            prefix: the prompt, in the same forms, one for all or one for each; templates often begin the answer, with
                <think> for example. "" says that it does not matter.
            tools: as for `apply_chat_template`: arguments of calls become of the types that they say.

        Raises InputError without `prefix`, and FormatError for a template that is none.
        """
        if prefix is None:
            raise InputError(
                "parse_response() needs prefix=, the prompt that was answered: templates often begin the answer, with "
                '<think> for example. Pass prefix="" where it does not.'
            )
        (answers, are_several), (prefixes, _) = self._as_texts(response), self._as_texts(prefix)
        template = self._response_template if schema is None else ResponseTemplate(schema)
        found = parse_answers(template, answers, prefixes, tools)
        return found if are_several else found[0]

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says itself how conversations are written."""
        return "default" in self._named_templates()

    @property
    def has_response_template(self) -> bool:
        """Whether the checkpoint says itself how its answers are taken apart."""
        return self._config.get("response_template") is not None

    @cached_property
    def _response_template(self) -> ResponseTemplate:
        own = self._config.get("response_template")
        if own is not None:
            return ResponseTemplate(own, f"response_template of {self.path / 'tokenizer_config.json'}")
        return template_of(family_of("\n".join(self._named_templates().values())))

    def _as_texts(self, given: Any) -> tuple[list[str], bool]:
        """Texts, or token ids as texts, with special tokens; and whether it is a list of them."""
        if isinstance(given, str):
            return [given], False
        rows = to_python(given)
        if isinstance(rows, list) and all(isinstance(row, str) for row in rows):
            return rows, bool(rows) or not isinstance(given, str)
        if isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows):
            return [self.decode(row, skip_special_tokens=False) for row in rows], True
        return [self.decode(rows, skip_special_tokens=False)], False

    def _encode_text(self, text: str, pair: str | None, add_special_tokens: bool) -> tokenizers.Encoding:
        _check_pair(text, pair)
        with self._library_errors(f"encode {text!r:.60}"):
            texts = self._strip_ends(text, pair, add_special_tokens)
            return self._with_own_ids(self._tokenizer.encode(*texts, add_special_tokens=add_special_tokens))

    def _strip_ends(self, text: str, pair: str | None, is_ended: bool) -> tuple[str, str | None]:
        """Both texts without the end token that they spell out, where the tokenizer adds it anyway."""
        own = self._config.get("own_vocabulary")
        if own is None or own.end is None or not is_ended:
            return text, pair
        one, two = (_strip_end(each, own.end) for each in (text, pair or ""))
        return one, None if pair is None else two

    def _with_own_ids(self, encoding: tokenizers.Encoding) -> tokenizers.Encoding:
        own = self._config.get("own_vocabulary")
        return encoding if own is None else cast(tokenizers.Encoding, _OwnIds(encoding, own, self._tokenizer))

    def _library_errors(self, what: str) -> AbstractContextManager[None]:
        return _calling_the_library(f"The tokenizer of {self.path} cannot {what}", InputError)

    def _check_truncation(self, length: int, stride: int, strategy: str, is_pair: bool) -> None:
        """Raise InputError for arguments on which the library panics, or never returns."""
        if strategy not in _STRATEGIES:
            raise InputError(f"strategy={strategy!r} is not known; choose one of: {', '.join(_STRATEGIES)}.")
        room = operator.index(length) - self._tokenizer.num_special_tokens_to_add(is_pair)
        if room < 1:
            raise InputError(f"length={length} leaves no room for text beside the tokenizer's special tokens.")
        if not isinstance(stride, int) or not 0 <= stride < room:
            raise InputError(
                f"stride={stride!r} must be a whole number from 0 to {room - 1}: pieces of {length} tokens hold {room} "
                f"of the text, and each must get on."
            )

    def _copy_with_truncation(self, length: int, stride: int, strategy: str) -> tokenizers.Tokenizer:
        # Truncation is state of the library's object, which other threads share. The copy is made from the file again:
        # serialized to text, a vocabulary would take memory for every id up to its largest.
        copy = tokenizers.Tokenizer.from_buffer(self._data)
        copy.no_padding()
        copy.encode_special_tokens = self._tokenizer.encode_special_tokens
        side = self._config.get("truncation_side", "right")
        copy.enable_truncation(length, stride=stride, strategy=strategy, direction=side)
        return copy

    @cached_property
    def _byte_tokens(self) -> str | None:
        """How tokens spell bytes, by the part of the decoder that reads them: "ByteFallback", "ByteLevel" or None."""
        decoder = self._tokenizer.decoder
        kinds = _decoder_types(msgspec.json.decode(decoder.__getstate__())) if decoder is not None else set()
        return next((kind for kind in ("ByteFallback", "ByteLevel") if kind in kinds), None)

    @cached_property
    def _sample_tokens(self) -> tuple[list[str], int]:
        """The tokens of a sample text and its length: decoders treat the first token differently from later ones."""
        tokens = self._encode_text("abcdef", None, False).tokens
        return tokens, len(self.join(tokens))

    @cached_property
    def _cleans_up(self) -> bool:
        # As in transformers: byte-pair encodings keep the spaces of their texts, so there is nothing to clean up.
        is_pairs = isinstance(self._tokenizer.model, tokenizers.models.BPE) and not self._config.get(_CLEANS_PAIRS)
        return bool(self._config.get("clean_up_tokenization_spaces")) and not is_pairs

    def _pad_rows(self, rows: list[list[int]], fill: int) -> Array:
        width = max(map(len, rows))
        result = np.full((len(rows), width), fill, np.int64)
        for target, row in zip(result, rows, strict=True):
            start = width - len(row) if self.padding_side == "left" else 0
            target[start : start + len(row)] = row
        return result

    def _choose_template(self, chosen: str | None, with_tools: bool) -> tuple[str, str]:
        """The template, and its name in errors."""
        named = self._named_templates()
        name = chosen or ("tool_use" if with_tools and "tool_use" in named else "default")
        if name in named:
            return named[name], f"The chat template of {self.path}"
        if chosen is not None and not chosen.isidentifier():
            return chosen, "The chat template that was given"
        if not named:
            raise InputError(f"{self.path} has no chat template; give a plain prompt instead of a conversation.")
        raise InputError(f"{self.path} has no chat template {name!r}; give chat_template one of: {', '.join(named)}.")

    def _named_templates(self) -> dict[str, str]:
        """The templates by name: those in files of their own, or else those in tokenizer_config.json."""
        named = {}
        if (data := self._files.get("chat_template.jinja")) is not None:
            named["default"] = _decode_utf8(data, self.path / "chat_template.jinja")
        for name, data in self._files.below(_MORE_TEMPLATES).items():
            if name.endswith(".jinja"):
                named[name.removesuffix(".jinja")] = _decode_utf8(data, self.path / _MORE_TEMPLATES / name)
        held = self._config.get("chat_template")
        if named or held is None:
            return named
        return {"default": held} if isinstance(held, str) else {each.name: each.template for each in held}

    def _read_json(self, name: str) -> dict[str, Any]:
        data = self._files.get(name)
        return {} if data is None else parse_object(data, str(self.path / name))


def _strip_end(text: str, end: str) -> str:
    bare = text.rstrip()
    return bare.removesuffix(end).rstrip() if bare.endswith(end) else text


class _OwnIds:
    """An encoding with the ids of the checkpoint's own vocabulary: pieces of sentencepiece that it lacks are unknown,
    and tokens that are no piece carry a mark."""

    def __init__(self, encoding: tokenizers.Encoding, own: _OwnVocabulary, tokenizer: tokenizers.Tokenizer) -> None:
        self._encoding, self._own, self._tokenizer = encoding, own, tokenizer
        self.ids = [self._own_id(*each) for each in zip(encoding.ids, encoding.tokens, strict=True)]

    def _own_id(self, index: int, token: str) -> int:
        if index < self._own.size and index != self._own.unknown:
            return index
        found: int | None = self._tokenizer.token_to_id(self._own.mark + token)
        return self._own.unknown if found is None else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoding, name)


@contextmanager
def _calling_the_library(failed: str, kind: type[PrecastError]) -> Iterator[None]:
    """Turn whatever the tokenizers library raises within into a `kind`: bare Exceptions, and for a panic of its Rust
    code a BaseException, which no `except Exception` would catch."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(f"{failed}: there is not so much memory.") from error
    except Exception as error:
        raise kind(f"{failed}: {_as_sentence(error)}") from error
    except BaseException as error:
        # The class pyo3_runtime.PanicException can be imported from nowhere.
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{failed}: {_as_sentence(error)}") from error


def _as_sentence(error: BaseException) -> str:
    return f"{' '.join(str(error).split()).removesuffix('.')}."


class TextStream:
    """Decodes a stream of token ids; text comes out as soon as it can no longer change, never half a character.

    A token's text depends on the tokens before it, so each step decodes a short window: the tokens of the last piece
    and those since.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._start = self._shown = 0

    def put(self, token: int) -> str:
        """Add a token; returns the text that is final now, perhaps none."""
        self._ids.append(token)
        before, after = self._window_texts()
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def end(self) -> str:
        """The remaining text, an incomplete character as U+FFFD."""
        before, after = self._window_texts()
        return after[len(before) :]

    def _window_texts(self) -> tuple[str, str]:
        window = self._ids[self._start :]
        known = window[: self._shown - self._start]
        return self._decode_ids(known), self._decode_ids(window)

    def _decode_ids(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _check_chat_options(variables: dict[str, Any], adds_prompt: bool | None, continues: bool | str) -> None:
    """Raise UsageError for arguments that exclude each other, or that would be taken for variables of the template.
    Takes those that change nothing out of `variables`."""
    for name, harmless in _WITHOUT_EFFECT.items():
        value = variables.pop(name, None)
        if value is not None and value not in harmless:
            raise UsageError(
                f"apply_chat_template() takes no {name}={value!r:.40}. The conversation comes first, without a name; "
                f"options of the tokenizer are its own: tokenizer(prompt, add_special_tokens=False, …)."
            )
    if adds_prompt and continues:
        raise UsageError("add_generation_prompt begins a new message, continue_final_message the last one: give one.")


def _as_ids(ids: Sequence[int] | Array) -> list[int]:
    try:
        numbers = [operator.index(each) for each in ids]
    except TypeError:
        raise InputError(f"Token ids are a list or an array of whole numbers; these are {ids!r:.80}.") from None
    if wrong := [number for number in numbers if not 0 <= number <= _LARGEST]:
        raise InputError(f"{wrong[0]} is no token id; these are whole numbers from 0 to {_LARGEST}.")
    return numbers


def _decode_utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text in UTF-8: {error}.") from error


def listed_texts(texts: str | Sequence[str]) -> list[str]:
    """A text, or a sequence of texts, as a list. Raises InputError for anything else, and for an empty one."""
    if isinstance(texts, str):
        return [texts]
    try:
        found = list(texts)
    except TypeError:
        raise InputError(f"Give a text or a list of texts; this is {texts!r:.80}.") from None
    if not found:
        raise InputError("There is no text to encode.")
    return found


def _check_pair(text: str, pair: str | None) -> None:
    _check_text(text)
    if pair is not None:
        _check_text(pair)


def _check_text(text: str) -> str:
    """Return a text. Raises InputError for anything else, and for halves of characters."""
    if not isinstance(text, str):
        raise InputError(f"A text is a str; this is {type(text).__name__}: {text!r:.80}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text has half a character, U+{ord(text[error.start]):04X}, at position {error.start}: "
            f"{text[max(0, error.start - 20) : error.end]!a}. It was decoded wrongly; errors='replace' helps."
        ) from None
    return text


def _decoder_types(part: Any) -> set[str]:
    """The "type" of all parts of a decoder."""
    if isinstance(part, list):
        return set().union(*map(_decoder_types, part))
    return {part["type"], *_decoder_types(part.get("decoders", []))}


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies such as GPT-2's: visible ones for themselves,
    those from U+0100 on for the others."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_characters()
_BYTE_TOKEN = re.compile("<0x([0-9a-fA-F]{2})>")


# The spaces between tokens that transformers' clean_up_tokenization removes.
_SPACES = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def _clean_spaces(text: str) -> str:
    for spaced, close in _SPACES:
        text = text.replace(spaced, close)
    return text


def _special_tokens(config: dict[str, Any], path: Path) -> dict[str, str]:
    found, own = {}, config.get("extra_special_tokens")
    # Tokens of one model's own are keys as the others are, or stand in an object of their names.
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    for name, token in {**named, **(own if isinstance(own, dict) else {})}.items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            try:
                found[name] = _check_text(text)
            except InputError as error:
                raise FormatError(f"{path} has a {name} that is no text. {error}") from None
    return found
