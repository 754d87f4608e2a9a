"""Stop strings: texts that end a row once a token completes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ..inputs.tokenizer import Tokenizer

__all__ = ["StopStrings"]

Array = np.ndarray[Any, Any]

_NO_TEXT = b"\xff"
"""Stands for ids that the tokenizer does not know: no UTF-8 text has this byte, so no match goes across it."""


class StopStrings:
    """Tests whether the newest token of a row completes a stop string, as transformers' StopStringCriteria does.

    The text of a row is that of its tokens one after the other: special tokens are part of it, and so is the prompt, in
    which a stop string may begin. It is compared as bytes, since a token may end within a character.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._texts = [text.encode() for text in texts]
        # Each token has a byte at least, so no older one can be part of a stop string that ends here.
        self._window = max(map(len, self._texts))
        self._piece = cache(tokenizer.piece)

    def __call__(self, tokens: Array) -> bool:
        """Whether the last of a row's tokens so far, int64 [length], completes a stop string."""
        pieces = [
            _NO_TEXT if (piece := self._piece(token)) is None else piece for token in tokens[-self._window :].tolist()
        ]
        row, new = b"".join(pieces), len(pieces[-1])
        return any(text in row[max(0, len(row) - new - len(text) + 1) :] for text in self._texts)
