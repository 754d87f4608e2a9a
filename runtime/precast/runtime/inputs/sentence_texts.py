"""The rules by which sentence-transformers encodes texts: a prompt before them, and the length they are cut to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tokenizers

from ..artifact.published_json import parse_object, select
from .companions import Readable
from .tokenizer import Tokenizer

__all__ = ["SentenceRules", "sentence_rules"]

_PROMPTS = "config_sentence_transformers.json"
_TRANSFORMER = "sentence_bert_config.json"
_TYPES: dict[str, dict[str, Any]] = {
    _PROMPTS: {"prompts": dict[str, str], "default_prompt_name": str},
    _TRANSFORMER: {"max_seq_length": Annotated[int, msgspec.Meta(ge=1)]},
}


@dataclass(frozen=True)
class SentenceRules:
    """How a model's texts are encoded.

    Attributes:
        prompt: stands before each text, where the caller gives no other.
        max_length: the most tokens of a text; None where it is not cut.
    """

    prompt: str = ""
    max_length: int | None = None

    def encode_text(
        self,
        tokenizer: Tokenizer,
        text: str,
        pair: str | None = None,
        *,
        prompt: str | None = None,
        length: int | None = None,
        **how: Any,
    ) -> tokenizers.Encoding:
        """The encoding of a text, or of a pair of texts, cut to `length` tokens where that is less; `how` goes on to
        `Tokenizer.encodings`. Raises InputError for what is no text."""
        before = self.prompt if prompt is None else prompt
        # The tokenizer refuses anything that is not text.
        whole = before + text if isinstance(text, str) else text
        found = tokenizer.encodings(whole, pair, **how)[0]
        limit = min((each for each in (self.max_length, length) if each is not None), default=None)
        if limit is None or len(found.ids) <= limit:
            return found
        return tokenizer.encodings(whole, pair, length=limit, **how)[0]


def sentence_rules(files: Readable, path: Path) -> SentenceRules:
    """The rules of an artifact, as its export wrote them; no-ops for other models. Raises FormatError."""
    found = {name: select(parse_object(files.get(name) or b"{}", str(path / name)), _TYPES[name], str(path / name))
             for name in _TYPES}  # fmt: skip
    prompts, default = found[_PROMPTS].get("prompts", {}), found[_PROMPTS].get("default_prompt_name")
    return SentenceRules(prompts.get(default, ""), found[_TRANSFORMER].get("max_seq_length"))
