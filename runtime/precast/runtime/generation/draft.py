"""Assisted decoding (Leviathan et al. 2023): a smaller model guesses the next tokens, and one step checks them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .session import Session

__all__ = ["Draft"]

Array = np.ndarray[Any, Any]

_COUNTS = (0, 1, 2, 4, 8, 16)
"""How many tokens are guessed at once: few sizes, since a step is bound to each."""
_TOKENS_PER_READ = 8
"""Checking so many tokens takes about as long as one step more (see session.py)."""
_MEMORY = 0.9
"""What earlier guesses count for beside the last ones."""
_FIRST_REST, _LONGEST_REST = 8, 128
"""Steps without guesses, after guesses that did not pay: doubled each time."""
_MOST_APPENDED = 2
"""As many as a step leaves behind, its last guess and what was chosen. Of more, only the last one's logits are
computed."""


class Draft:
    """Guesses of a model that is quicker, for one row: the likeliest tokens, one after the other.

    How many follows from how many were right so far and from how long a token of the draft takes, so that steps are
    hardly ever slower than without. It does not look at a clock: an answer of a quantized model, whose kernels round
    one token otherwise than several, is the same each time.

    Args:
        session: the draft's caches, of batch 1.
        tokens: the row so far.
        most: guess at most so many tokens at once; as many as pay if None.
        cost: the time of a step of the draft, in steps of the model that checks.
    """

    def __init__(self, session: Session, tokens: Iterable[int], most: int | None, cost: float) -> None:
        self._session, self._tokens, self._cost = session, list(tokens), cost
        self._counts = [count for count in _COUNTS if most is None or count <= most]
        self._tried, self._right = 2.0, 1.5
        self._same = 0
        """So many tokens that the session holds are known to be the row's."""
        self._rest, self._next_rest = 0, _FIRST_REST

    def append(self, token: int) -> None:
        """Add a token to the row."""
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """Guess up to `room` next tokens; none where it would not pay."""
        count = min(self._choose_count(), room, self._session.capacity - len(self._tokens))
        found: list[int] = []
        while len(found) < count:
            logits = self._session.append([found[-1]])[-1] if found else self._catch_up()
            found.append(int(logits.argmax()))
        return found

    def adapt_count(self, guessed: int, right: int) -> None:
        """Learn from a step: of the last `guessed` tokens the first `right` were right."""
        if guessed:
            # Those after the first wrong one were not looked at.
            self._tried = _MEMORY * self._tried + min(guessed, right + 1)
            self._right = _MEMORY * self._right + right

    def _choose_count(self) -> int:
        """The number of guesses that makes tokens come fastest; now and then one, where none do."""
        if self._rest:
            self._rest -= 1
            return 0
        best = max(self._counts, key=self._speed)
        if best:
            self._next_rest = _FIRST_REST
            return best
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        return min(1, self._counts[-1])

    def _speed(self, count: int) -> float:
        """Tokens per step's time, if each of `count` guesses is right as often as before."""
        share = self._right / self._tried
        return sum(share**index for index in range(count + 1)) / (1 + count * (self._cost + 1 / _TOKENS_PER_READ))

    def _catch_up(self) -> Array:
        """Take in the row's tokens that the session lacks; returns the logits after the last one."""
        held, known = self._session.tokens[0], len(self._tokens) - 1
        while self._same < min(len(held), known) and held[self._same] == self._tokens[self._same]:
            self._same += 1
        missing = self._tokens[self._same :]
        if not self._same or len(missing) > _MOST_APPENDED:
            logits: Array = self._session.prefill([np.array(self._tokens)])[0]
        else:
            self._session.drop(len(held) - self._same)
            logits = self._session.append(missing)[-1]
        self._same = known
        return logits
