"""Text <-> token ids with the `tokenizers` library, chat templates with jinja2; no transformers.

What a checkpoint's `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` say is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from .errors import ArtifactError, InputError
from .tensors import as_tensors

__all__ = ["TextStream", "Tokenizer"]

Array = np.ndarray[Any, Any]
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of an artifact. Raises ArtifactError where the directory has none.

    `names` are the arrays that its model takes, where that is known; no others are made.
    """

    def __init__(self, path: str | Path, *, names: Sequence[str] | None = None) -> None:
        self.path, self._names = Path(path), names
        if not (self.path / "tokenizer.json").is_file():
            raise ArtifactError(
                f"{self.path} has no tokenizer.json: its checkpoint carries no (fast) tokenizer. Give token ids "
                f"instead of text."
            )
        self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
        # The file may fix a length of its own; here the compiled model decides.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = _read_json(self.path / "tokenizer_config.json")
        self.special_tokens = _special_tokens({**_read_json(self.path / "special_tokens_map.json"), **self._config})
        self.padding_side = self._config.get("padding_side", "right")
        self._cutting = lru_cache(maxsize=4)(self._copy_that_cuts)

    def token_id(self, name: str) -> int | None:
        """The id of a special token by its role: "bos", "eos", "pad", "unk", "cls", "sep", "mask"."""
        token = self.special_tokens.get(f"{name}_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, or of a pair of texts."""
        return list(self._encode(text, pair, add_special_tokens).ids)

    def decode(self, ids: Sequence[int] | Array, *, skip_special_tokens: bool = True) -> str:
        """The text of a list of ids."""
        text = str(self._tokenizer.decode([int(each) for each in ids], skip_special_tokens=skip_special_tokens))
        return _cleaned(text) if self._cleans_up else text

    def batch_decode(self, rows: Sequence[Sequence[int]] | Array, *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each row of ids, such as those that `generate` answers; a tensor of torch is taken, too."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def token(self, index: int) -> str | None:
        """The token with this id, as the vocabulary spells it."""
        found: str | None = self._tokenizer.id_to_token(index)
        return found

    def vocabulary_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        return self._tokenizer.token_to_id(token)

    @property
    def marks_subwords(self) -> bool:
        """Whether a token that goes on with a word is written differently from one that begins it, as in WordPiece."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens as the vocabulary spells them."""
        decoder = self._tokenizer.decoder
        return str(decoder.decode(list(tokens))) if decoder is not None else " ".join(tokens)

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
            return [self._encode(text, pair, add_special_tokens)]
        try:
            cutting = self._cutting(length, stride, strategy)
            whole = cutting.encode(text, pair, add_special_tokens=add_special_tokens)
        except Exception as error:
            # The library raises no narrower class.
            raise InputError(
                f"The text cannot be cut to {length} tokens with an overlap of {stride}: {error}"
            ) from error
        return [whole, *whole.overflowing]

    def pad(self, encodings: Sequence[tokenizers.Encoding]) -> dict[str, Array]:
        """A batch of encodings: int64 arrays [batch, longest], padded on the tokenizer's own side; all three, or those
        that the checkpoint's tokenizer_config.json names, and the model takes."""
        pad = self.token_id("pad") or 0
        rows = {
            "input_ids": ([each.ids for each in encodings], pad),
            "token_type_ids": ([each.type_ids for each in encodings], 0),
            "attention_mask": ([[1] * len(each.ids) for each in encodings], 0),
        }
        named = {*self._config.get("model_input_names", rows)}.intersection(self._names or rows)
        return {name: self._pad(values, fill) for name, (values, fill) in rows.items() if name in named}

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """A batch: int64 arrays [batch, longest], padded on the tokenizer's own side.

        `return_tensors="pt"` makes tensors of torch, "np" is the same as None. Raises UsageError for anything else.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise InputError("There is no text to encode.")
        encodings = [
            self._encode(text, pairs[index] if pairs else None, add_special_tokens) for index, text in enumerate(texts)
        ]
        return as_tensors(self.pad(encodings), return_tensors)

    def offsets(self, text: str, pair: str | None = None) -> list[tuple[int, int]]:
        """For every token of `encode`, where in its text it stands: (first character, one past the last)."""
        return list(self._encode(text, pair, True).offsets)

    def sequence_ids(self, text: str, pair: str | None = None) -> list[int | None]:
        """For every token of `encode`, 0 or 1 for the text it belongs to, None for special tokens."""
        return list(self._encode(text, pair, True).sequence_ids)

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation. Raises InputError where there is no template or it refuses."""
        from jinja2.exceptions import TemplateError

        source = self._template(bool(tools))
        try:
            template = self._templates.from_string(source)
            text: str = template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
                **self.special_tokens, **variables,
            )  # fmt: skip
            return text
        except TemplateError as error:
            raise InputError(f"The chat template of {self.path} refused this conversation: {error}") from error

    def _encode(self, text: str, pair: str | None, add_special_tokens: bool) -> tokenizers.Encoding:
        return self._tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)

    def _copy_that_cuts(self, length: int, stride: int, strategy: str) -> tokenizers.Tokenizer:
        # Cutting is a state of the library's object, which other threads share.
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.enable_truncation(length, stride=stride, strategy=strategy)
        return copy

    @cached_property
    def _cleans_up(self) -> bool:
        # As in transformers: byte-pair encodings keep the spaces of their texts, so there is nothing to clean up.
        is_pairs = isinstance(self._tokenizer.model, tokenizers.models.BPE)
        return bool(self._config.get("clean_up_tokenization_spaces")) and not is_pairs

    def _pad(self, rows: list[list[int]], fill: int) -> Array:
        width = max(map(len, rows))
        result = np.full((len(rows), width), fill, np.int64)
        for target, row in zip(result, rows, strict=True):
            start = width - len(row) if self.padding_side == "left" else 0
            target[start : start + len(row)] = row
        return result

    def _template(self, with_tools: bool) -> str:
        file = self.path / "chat_template.jinja"
        source = file.read_text("utf-8") if file.is_file() else self._config.get("chat_template")
        if isinstance(source, list):
            named = {each["name"]: each["template"] for each in source}
            source = named.get("tool_use") if with_tools and "tool_use" in named else named.get("default")
        if not isinstance(source, str):
            raise InputError(f"{self.path} has no chat template; give a plain prompt instead of a conversation.")
        return source

    @cached_property
    def _templates(self) -> Any:
        """The sandbox in which transformers renders templates, rebuilt after its chat_template_utils."""
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment


class TextStream:
    """Token ids in, text out as soon as it can no longer change; never half a character.

    A token's text depends on what stands before it, so each step decodes a short window: the tokens of the last piece
    and those since.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._start = self._shown = 0

    def put(self, token: int) -> str:
        """Add a token; returns the text that is now certain, perhaps none."""
        self._ids.append(token)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def end(self) -> str:
        """What is left, an incomplete character as U+FFFD."""
        before, after = self._texts()
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        window = self._ids[self._start :]
        known = window[: self._shown - self._start]
        return self._decode(known), self._decode(window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from error
    return value if isinstance(value, dict) else {}


# What transformers' clean_up_tokenization takes back of spaces that a tokenizer has put between tokens.
_SPACES = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def _cleaned(text: str) -> str:
    for spaced, close in _SPACES:
        text = text.replace(spaced, close)
    return text


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
