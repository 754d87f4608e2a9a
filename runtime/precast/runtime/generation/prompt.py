"""A prompt, without its padding and as the caller gave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .adapters import LoadedAdapter

__all__ = ["Prompt"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row to continue.

    Attributes:
        tokens: the row without padding, int64 [length], which the model reads.
        shown: the row as the caller gave it, int64 [width]. Its padding counts wherever transformers counts a row's
            tokens, and the caller's own functions see it, as they do there.
        index: which of the call's prompts it is.
        adapter: what is added to the model's weights for it.
    """

    tokens: Array
    shown: Array
    index: int = 0
    adapter: LoadedAdapter | None = None

    @classmethod
    def rows(
        cls, tokens: Iterable[Array], shown: Iterable[Array], adapters: Iterable[LoadedAdapter | None] | None = None
    ) -> list[Prompt]:
        """The prompts of a call, in their order."""
        pairs = list(zip(tokens, shown, strict=True))
        own = [None] * len(pairs) if adapters is None else adapters
        return [cls(*pair, index, adapter) for index, (pair, adapter) in enumerate(zip(pairs, own, strict=True))]

    def length_of(self, tokens: Array) -> int:
        """Count this row's tokens [length + new] as the caller does: its padding included."""
        return len(self.shown) + len(tokens) - len(self.tokens)

    def show(self, tokens: Array) -> Array:
        """This row's tokens [length + new] with the caller's padding, in new memory [width + new]."""
        return np.concatenate([self.shown, tokens[len(self.tokens) :]])
