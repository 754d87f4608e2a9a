"""Prompt lookup decoding (Saxena 2023): guess the next tokens from an earlier occurrence of the last ones."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Lookup"]

_FIRST = 4
"""Tokens of the first guess."""
_LONGEST = 32
"""Longest n-gram that is looked for: memory grows with its square, and one of 33 would tell no more than one of 32."""


class Lookup:
    """An index of a row's n-grams, which guesses that the last tokens are followed by what followed them before.

    The longest n-gram that occurred before counts; of several places the latest, which simulations on quoting, code and
    free text favour over the first. How many tokens are guessed doubles while all are right and halves when one is
    wrong, since a step takes the longer the more tokens it checks. It is always 1, 2, 4, ... or `most`, so that an
    engine meets few sizes.

    Args:
        tokens: the row so far.
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
        """Add a token to the row and to the index."""
        # N-grams are indexed one token late: their continuation starts at this token.
        for size in range(1, min(self._longest, len(self._tokens)) + 1):
            self._next[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """Guess up to `room` next tokens; none where the last token never occurred before."""
        start, count = self._find_continuation(), self._guess_count(room)
        if start is None or not count:
            return []
        found = self._tokens[start : start + count]
        # A continuation that reaches the end of the row repeats itself from there.
        while len(found) < count:
            found.append(found[start - len(self._tokens)])
        return found

    def adapt_count(self, guessed: int, right: int) -> None:
        """Adapt how many tokens are guessed: of the last `guessed` ones the first `right` were right."""
        if guessed:
            self._count = min(2 * self._count, self._most) if right == guessed else max(1, self._count // 2)

    def _find_continuation(self) -> int | None:
        """Where the continuation of the last tokens' latest occurrence begins."""
        keys = (tuple(self._tokens[-size:]) for size in range(self._longest, 0, -1))
        return next((self._next[key] for key in keys if key in self._next), None)

    def _guess_count(self, room: int) -> int:
        count = min(self._count, room)
        return count if count in {0, self._most} else 1 << count.bit_length() - 1
