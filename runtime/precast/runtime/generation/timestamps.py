"""When Whisper may write times, and what a text with times says (Radford et al. 2022), as transformers has it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .probabilities import log_softmax

__all__ = ["FRAMES_PER_TIME", "SECONDS_PER_TIME", "Segment", "TimestampRules", "average_logprob", "compression_ratio",
           "split_segments"]  # fmt: skip

Array = np.ndarray[Any, Any]

SECONDS_PER_TIME, FRAMES_PER_TIME = 0.02, 2
"""A timestamp token is a multiple of 0.02 s, two frames of a spectrogram."""


class TimestampRules:
    """A logits processor: times come in pairs, never fall, and come where together they are likelier than any text.

    `silent` is the token of no timestamps, which the times follow; `end` ends an answer, which begins after a row's
    first `start` tokens. The first time is no later than `latest_first` times, where that is given.
    """

    def __init__(self, silent: int, end: int, start: int, latest_first: int | None) -> None:
        self._silent, self._first, self._end = silent, silent + 1, end
        self._start, self._latest_first = start, latest_first

    def __call__(self, tokens: Array, logits: Array) -> Array:
        new, first = tokens[self._start :], self._first
        scores = logits.copy()
        scores[self._silent] = -np.inf
        is_time = new >= first
        after_time, after_two = bool(is_time[-1:].any()), len(new) < 2 or bool(is_time[-2])
        if after_time:
            # A second time closes a pair; then comes text, or before it the end.
            scores[slice(first, None) if after_two else slice(0, self._end)] = -np.inf
        if is_time.any():
            last = int(new[is_time][-1])
            scores[first : last if after_time and not after_two else last + 1] = -np.inf
        if not len(new):
            scores[:first] = -np.inf
            if self._latest_first is not None:
                scores[first + self._latest_first + 1 :] = -np.inf
        if scores.max() == -np.inf:
            return scores
        likelihoods = log_softmax(scores)
        if np.logaddexp.reduce(likelihoods[first:]) > likelihoods[:first].max():
            scores[:first] = -np.inf
        return scores


@dataclass(frozen=True)
class Segment:
    """A piece of what was said: from when to when, in seconds of the whole sound, and its tokens, times included.

    `result` is the whole row that it was cut from, with what the row begins with and its end.
    """

    start: float
    end: float
    tokens: list[int]
    result: list[int] = field(default_factory=list)


def split_segments(tokens: Sequence[int], first: int, offset: float, frames: int) -> tuple[list[Segment], int]:
    """The segments in an answer to so many frames that begin `offset` seconds into the sound, and how many of these
    frames they are of: what follows is heard again. `first` is the first timestamp token."""
    is_time = [token >= first for token in tokens]
    ends = [at + 1 for at in range(len(tokens) - 1) if is_time[at] and is_time[at + 1]]
    if not ends:
        times = [token for token in tokens if token >= first]
        last = int(frames * (SECONDS_PER_TIME / FRAMES_PER_TIME) / SECONDS_PER_TIME)
        if times and times[-1] != first:
            last = times[-1] - first
        return [Segment(offset, offset + last * SECONDS_PER_TIME, list(tokens))], frames
    is_closed = is_time[-2:] == [False, True]
    if is_closed:
        ends.append(len(tokens))
    else:
        # The last segment keeps both times, by which one knows that the sound goes on.
        ends[-1] += 1
    found, begin = [], 0
    for number, end in enumerate(ends):
        part = list(tokens[begin:end])
        closing = part[-1] if is_closed or number < len(ends) - 1 else part[-2]
        times_ = [offset + (time - first) * SECONDS_PER_TIME for time in (part[0], closing)]
        found.append(Segment(times_[0], times_[1], part))
        begin = end
    return found, frames if is_closed else (tokens[begin - 2] - first) * FRAMES_PER_TIME


def compression_ratio(tokens: Sequence[int], vocabulary: int) -> float:
    """How much zlib makes of an answer's tokens: much where it repeats itself."""
    size = int(math.log2(vocabulary) / 8) + 1
    data = b"".join(token.to_bytes(size, "little") for token in tokens)
    return len(data) / len(zlib.compress(data))


def average_logprob(scores: Sequence[Array], tokens: Sequence[int], temperature: float) -> float:
    """The mean log-probability of an answer's tokens, its end included, by the scores that they were chosen from."""
    scale = np.float32(temperature if temperature > 0 else 1)
    pairs = list(zip(scores, tokens[-len(scores) :], strict=False))
    return float(sum(log_softmax(row * scale)[token] for row, token in pairs)) / len(pairs)
