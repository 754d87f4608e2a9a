"""What may come next, looked up in what came before (prompt lookup decoding, Saxena 2023)."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Lookup"]

_FIRST = 4
_LONGEST = 32
"""What is remembered grows with its square, and who finds 32 tokens again learns nothing from the one before them."""


class Lookup:
    """Guesses that what followed the last few tokens where they occurred before follows them again.

    The longest sequence that occurred counts; of several places the latest, which simulations on quoting, code and
    free text favour over the first. How many tokens are guessed doubles while all are right and halves when one is
    wrong, since a step takes the longer the more tokens it checks. It is always 1, 2, 4, ... or `most`, so that an
    engine meets few sizes.

    Args:
        tokens: what is there already.
        most: guess at most so many tokens.
        longest: look for the last so many tokens, at most 32, then for fewer.
    """

    def __init__(self, tokens: Iterable[int], most: int, longest: int) -> None:
        self._most, self._longest = most, min(longest, _LONGEST)
        self._count = min(_FIRST, most)
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token came."""
        # Only now it is known where that which follows the tokens before it begins.
        for size in range(1, min(self._longest, len(self._tokens)) + 1):
            self._next[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """Tokens that may come next, at most `room`; none where the last token never occurred before."""
        start, count = self._find(), self._size(room)
        if start is None or not count:
            return []
        found = self._tokens[start : start + count]
        # A copy that runs into its own beginning goes round in circles.
        while len(found) < count:
            found.append(found[start - len(self._tokens)])
        return found

    def learn(self, guessed: int, right: int) -> None:
        """Of `guessed` tokens the first `right` were right."""
        if guessed:
            self._count = min(2 * self._count, self._most) if right == guessed else max(1, self._count // 2)

    def _find(self) -> int | None:
        """Where the continuation of the last tokens' latest occurrence begins."""
        keys = (tuple(self._tokens[-size:]) for size in range(self._longest, 0, -1))
        return next((self._next[key] for key in keys if key in self._next), None)

    def _size(self, room: int) -> int:
        count = min(self._count, room)
        return count if count in {0, self._most} else 1 << count.bit_length() - 1
