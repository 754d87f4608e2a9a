"""A prompt, without its padding and as the caller gave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Prompt"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row to continue.

    Attributes:
        tokens: the row without padding, int64 [length], which the model reads.
        shown: the row as the caller gave it, int64 [width]. Its padding counts wherever transformers counts a row's
            tokens, and the caller's own functions see it, as they do there.
    """

    tokens: Array
    shown: Array

    def length_of(self, tokens: Array) -> int:
        """Count this row's tokens [length + new] as the caller does: its padding included."""
        return len(self.shown) + len(tokens) - len(self.tokens)

    def show(self, tokens: Array) -> Array:
        """This row's tokens [length + new] with the caller's padding, in new memory [width + new]."""
        return np.concatenate([self.shown, tokens[len(self.tokens) :]])
