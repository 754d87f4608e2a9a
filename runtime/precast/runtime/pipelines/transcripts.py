"""What Whisper's tokens say: text, and pieces of it with their times, as transformers' pipeline reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..inputs.tokenizer import Tokenizer
from ..models.languages import CODES

__all__ = ["Chunk", "language_names", "split_chunks"]

_WINDOW_TIMES = 1500
"""Times of a window, after which those of the next begin at 0."""


@dataclass
class Chunk:
    """A piece of what was said: from when to when, in seconds, in which language, and its tokens; None is unknown."""

    language: str | None = None
    start: float | None = None
    end: float | None = None
    tokens: list[int] = field(default_factory=list)


def language_names(tokenizer: Tokenizer) -> dict[int, str]:
    """The English names of the languages that a tokenizer's special tokens stand for, by their ids."""
    names = {f"<|{code}|>": name for name, code in reversed(CODES.items())}
    return {index: names[token] for token, index in tokenizer.added_tokens.items() if token in names}


def split_chunks(
    tokens: Sequence[int],
    *,
    first: int | None,
    special: set[int],
    languages: Mapping[int, str],
    seconds: float,
    splits_languages: bool,
) -> list[Chunk]:
    """Split the tokens of one sound into chunks.

    A time ends a chunk or begins the next. Times fall where another window begins: after a closed one by a whole
    window, else by what was heard of the last, whose final time stands there twice.

    Args:
        tokens: what was generated.
        first: the first timestamp token; None where there are no times.
        special: tokens that are no text.
        languages: names by token.
        seconds: of one time.
        splits_languages: whether another language begins a chunk, where times do not.
    """
    clock = _Clock(tokens, first, seconds)
    done, chunk = [], Chunk()
    for place, token in enumerate(tokens):
        if token in special:
            language = languages.get(token, chunk.language)
            if splits_languages and chunk.language is not None and language != chunk.language:
                done.append(chunk)
                chunk = Chunk()
            chunk.language = language
        elif first is None or token < first:
            chunk.tokens.append(token)
        elif (moment := clock.read(place)) != chunk.start:
            if chunk.start is None:
                chunk.start = moment
                continue
            chunk.end = moment
            done.append(chunk)
            chunk = Chunk(chunk.language)
    return [*done, chunk] if chunk.tokens else done


class _Clock:
    """Times of the whole sound, by those of its windows."""

    def __init__(self, tokens: Sequence[int], first: int | None, seconds: float) -> None:
        self._tokens, self._first, self._seconds = tokens, first or 0, seconds
        self._before = self._latest = self._offset = 0.0

    def read(self, place: int) -> float:
        """The time at this place, to be read one after the other."""
        time = float((self._tokens[place] - self._first) * self._seconds)
        if time < self._latest:
            is_pair = place < 2 or min(self._tokens[place - 2 : place]) >= self._first
            if is_pair:
                self._latest = self._before
                self._offset += self._before
            else:
                self._offset += self._seconds * _WINDOW_TIMES
        self._before, self._latest = self._latest, time
        return round(time + self._offset, 2)
