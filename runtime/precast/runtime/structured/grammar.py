"""Grammars compiled by llguidance, and the tokens that each lets come next."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from ..inputs.tokenizer import Tokenizer
from .structure import Structure

__all__ = ["Grammars", "RowGrammar"]

Array = np.ndarray[Any, Any]

_MOST_KEPT = 64
"""Compiled grammars that are kept, those that were used last."""
_SHOWN = 60
"""Characters of an answer that a message shows."""
_NO_TOKEN = b"\xff"
"""Begins what stands for ids without a token: no text has this byte."""


class Grammars:
    """Compiles grammars for a tokenizer, each once.

    `vocabulary` is the number of logits, `ends` are the end-of-sequence tokens. Raises UsageError where llguidance is
    not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> None:
        self._library = _import_library()
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, [*ends]
        self._tokens = _library_tokenizer(self._library, tokenizer, vocabulary, ends)
        self._kept: OrderedDict[Structure, Any] = OrderedDict()
        self._lock = Lock()

    def begin(self, structure: Structure, start: int) -> RowGrammar:
        """A grammar at its beginning, for an answer after a row's first `start` tokens. Raises InputError for one that
        cannot be compiled."""
        with self._lock:
            matcher = self._kept.get(structure) or self._compile(structure)
            self._kept[structure] = matcher
            self._kept.move_to_end(structure)
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return RowGrammar(matcher.deep_copy(), structure, self, start)

    def _compile(self, structure: Structure) -> Any:
        try:
            grammar = self._write_grammar(structure)
        except ValueError as error:
            raise InputError(f"{structure.name} cannot be compiled: {_one_line(str(error))}") from None
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"{structure.name} cannot be compiled: {_one_line(matcher.get_error())}")
        return matcher

    def _write_grammar(self, structure: Structure) -> str:
        """The library's own text of a grammar. Raises ValueError."""
        if structure.kind == "json_schema":
            # As short as can be: each free space would be a token to wait for.
            compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
            found = self._library.LLMatcher.grammar_from_json_schema(structure.text, overrides=compact)
        elif structure.kind == "choices":
            quoted = (json.dumps(each, ensure_ascii=False) for each in json.loads(structure.text))
            found = self._library.grammar_from("lark", f"start: {' | '.join(quoted)}")
        elif structure.kind == "regex":
            found = self._library.grammar_from("regex", _with_plain_digits(structure.text))
        else:
            found = self._library.grammar_from("grammar", structure.text)
        return str(found)


class RowGrammar:
    """A grammar as far as the answer of one row has come. The answer begins after the row's first `start` tokens."""

    def __init__(self, matcher: Any, structure: Structure, grammars: Grammars, start: int) -> None:
        self._matcher, self._structure, self._start = matcher, structure, start
        self._tokenizer, self._vocabulary, self._ends = grammars.tokenizer, grammars.vocabulary, grammars.ends
        self._taken: list[int] = []
        self._mask: Future[bytes] | None = None

    def apply(self, tokens: Array, logits: Array) -> Array:
        """The logits [vocabulary] after a row's tokens so far [length], -inf for what would leave the form. Raises
        InputError where nothing is left."""
        if len(tokens) < self._start:
            return logits
        self._follow(tokens)
        mask = self._mask.result() if self._mask else self._matcher.compute_bitmask()
        self._mask = None
        allowed = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._vocabulary, bitorder="little")
        # Where no token fits, the library lets an answer end that is not complete.
        if not allowed.any() or (allowed[self._ends].any() and not self._matcher.is_accepting()):
            raise InputError(self._describe_end())
        # Ten times as quick as choosing by a mask: the smaller of a logit and infinity is itself.
        limits = np.subtract(allowed, np.float32(0.5), dtype=np.float32) * np.float32(np.inf)
        return np.minimum(logits, limits)

    def is_complete(self, tokens: Array) -> bool:
        """Whether nothing can follow a row's tokens so far. If not, what can is computed meanwhile, beside the model's
        step."""
        if len(tokens) <= self._start:
            return False
        self._follow(tokens)
        if self._mask is None:
            if self._matcher.is_stopped():
                return True
            self._mask = _worker().submit(self._matcher.compute_bitmask)
        return False

    def _follow(self, tokens: Array) -> None:
        """Take in the tokens that came since."""
        new = tokens[self._start + len(self._taken) :].tolist()
        if new and self._mask:
            # It reads what changes now.
            self._mask.result()
            self._mask = None
        for token in new:
            if not self._matcher.consume_token(token):
                raise InputError(self._describe_end())
            self._taken.append(token)

    def _describe_end(self) -> str:
        told = self._tokenizer.decode(self._taken, skip_special_tokens=False)
        place = f"after {told[-_SHOWN:]!r}" if told else "at the beginning"
        # The library says besides what its parser holds, and where nothing fits, names of its own.
        reason = _one_line(self._matcher.get_error().partition("<state>")[0])
        if not reason or reason.startswith("NoExtension"):
            reason = "none of the model's tokens fits there"
        return f"{self._structure.name} leaves no token {place}: {reason}."


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "precast-grammar")


# A process that was forked has none of its threads.
os.register_at_fork(after_in_child=_worker.cache_clear)


def _import_library() -> ModuleType:
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise UsageError(
            f"Answers of a given form need llguidance, which cannot be imported: {error}. "
            f"pip install 'precast[structured]'"
        ) from error


def _library_tokenizer(library: ModuleType, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> Any:
    """The tokenizer as the library has it: the bytes of each token, and which are no text."""
    pieces = tokenizer.pieces(range(vocabulary))
    silent = {index for index, piece in enumerate(pieces) if not piece}
    # The library wants an end: where there is none, an id that no model has.
    tokens = [piece or _NO_TOKEN + b"<%d>" % index for index, piece in enumerate([*pieces, None])]
    held = _Tokens(tokenizer, tokens, sorted({*silent, *ends, vocabulary, *tokenizer.special_ids}))
    return library.LLTokenizer(
        library.TokenizerWrapper(held), eos_token=[*ends] or [vocabulary], slices=library.LLTokenizer.json_slices()
    )


class _Tokens:
    """What the library reads of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int]) -> None:
        self._tokenizer, self.tokens, self.special_token_ids = tokenizer, tokens, special
        self.eos_token_id = len(tokens) - 1

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _with_plain_digits(pattern: str) -> str:
    r"""A pattern in which \d is 0 to 9, as in JSON schemas and other servers' patterns; the library's is any script's
    digit, which models with tokens of single bytes do write."""
    depth, found = 0, []
    for part in re.findall(r"\\.|\[\^?\]?|.", pattern, re.DOTALL):
        depth += (part[0] == "[") - (part == "]" and depth > 0)
        plain = {r"\d": "0-9" if depth else "[0-9]", r"\D": part if depth else "[^0-9]"}
        found.append(plain.get(part, part))
    return "".join(found)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
