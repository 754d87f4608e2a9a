"""Classifier-free guidance: what the model would say without the prompt, or after another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .adapters import LoadedAdapter
from .processors import guide
from .session import Session

__all__ = ["Guidance"]

Array = np.ndarray[Any, Any]


class Guidance:
    """Rows that run beside those of a call, in caches of their own, and are continued by the same tokens.

    `prompts` begin them, one for each row of the call, whose adapters they have.
    """

    def __init__(
        self, session: Session, prompts: Sequence[Array], scale: float, adapters: Sequence[LoadedAdapter | None]
    ) -> None:
        self._session, self._scale = session, scale
        session.use_adapters(adapters)
        self._logits = session.prefill(prompts)

    def decode(self, tokens: Sequence[int | None]) -> None:
        """Continue the rows that are given a token."""
        self._logits = self._session.decode(tokens)

    def __call__(self, row: int, logits: Array) -> Array:
        """A row's log-probabilities, guided."""
        return guide(logits, self._logits[row], self._scale)
