"""Sounds of any length, written down window by window, as transformers' sequential long form does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..generation.config import GenerationConfig
from ..generation.outputs import Answer
from ..generation.timestamps import (
    FRAMES_PER_TIME,
    SECONDS_PER_TIME,
    Segment,
    TimestampRules,
    average_logprob,
    compression_ratio,
    split_segments,
)
from ..inputs.spectrogram import Spectrogram

__all__ = ["Listening", "listen"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Listening:
    """How a sound is written down.

    Attributes:
        config: the settings of each window's answer.
        start: what each answer begins with: start, language, task.
        prompt: tokens that stand before, of the first window or, with `prompts_all`, of all; none if empty.
        prompts_all: whether the prompt stands before every window.
        continues: whether each window is told what was written before.
        previous: the token that what was written before begins with, if the model has one.
        temperatures: tried one after the other while an answer is bad; None takes the likeliest tokens.
        most_compressed, least_likely: when an answer is bad, by compression_ratio and average_logprob.
        silence: above this probability of no speech an unlikely answer is left out.
        silent: the token of no timestamps.
        latest_first: the latest first time, if there is such a limit.
        positions: how many tokens the decoder's rows can have.
        vocabulary: how many tokens there are.
        writes_times: whether answers have times.
    """

    config: GenerationConfig
    start: list[int]
    prompt: list[int]
    prompts_all: bool
    continues: bool
    previous: int | None
    temperatures: Sequence[float | None]
    most_compressed: float | None
    least_likely: float | None
    silence: float | None
    silent: int | None
    latest_first: int | None
    positions: int
    vocabulary: int
    writes_times: bool


Ask = Callable[[Array, list[int], GenerationConfig, int, list[TimestampRules]], Answer]
"""Answers a window [mels, frames], with what an answer begins with, settings, new tokens at most and rules."""


def listen(
    features: Array | Spectrogram,
    frames: int,
    window: int,
    how: Listening,
    ask: Ask,
    silence_of: Callable[[Array, list[int], int], float],
    progress: Callable[[int], None] = lambda seek: None,
) -> list[Segment]:
    """The segments of a sound, float32 [mels, more], of which `frames` are heard, `window` at a time. `silence_of` is
    the probability of no speech, by a window, what its answer begins with, and the place of the start in that."""
    seek, found = 0, [Segment(0, 0, how.prompt)] if how.prompt and not how.prompts_all else []
    prompts, continues, longest = len(found), how.continues, how.config.max_length
    while seek < frames:
        progress(seek)
        heard = min(frames - seek, window)
        part = np.zeros((features.shape[0], window), np.float32)
        part[:, :heard] = features[:, seek : seek + heard]
        begin = _begin(how, found if continues else [])
        count, longest = _count(how, len(begin), longest)
        answer, continues, is_silent = _answer(part, begin, count, how, ask, silence_of)
        if is_silent:
            seek += heard
            continue
        first = how.vocabulary + 1 if how.silent is None else how.silent + 1
        offset = seek * SECONDS_PER_TIME / FRAMES_PER_TIME
        ended = answer[:-1] if answer and answer[-1] in how.config.eos_ids else answer
        segments, done = split_segments(ended, first, offset, heard)
        found += [replace(segment, result=[*begin, *answer]) for segment in segments]
        seek += done
    return found[prompts:]


def _begin(how: Listening, before: Sequence[Segment]) -> list[int]:
    """What an answer begins with, where these segments were written before."""
    if not before:
        return [*how.prompt, *how.start]
    told: list[int] = []
    for segment in before:
        ends_twice = how.silent is not None and len(segment.tokens) > 2 and segment.tokens[-2] > how.silent
        told += segment.tokens[:-1] if ends_twice else segment.tokens
    told = told[-(how.positions // 2 - 1) :]
    mark = how.prompt if how.prompts_all and how.prompt else [] if how.previous is None else [how.previous]
    return [*mark, *told, *how.start]


def _count(how: Listening, begun: int, longest: int | None) -> tuple[int, int | None]:
    """How many tokens a window's answer has at most, and max_length for the next window: as in transformers it grows by
    what the answer begins with."""
    if how.config.max_new_tokens is not None or longest is None:
        return how.config.new_tokens(begun), longest
    longest = min(longest + min(how.positions // 2 - 1, begun), how.positions)
    return max(1, longest - begun), longest


def _answer(
    part: Array,
    begin: list[int],
    count: int,
    how: Listening,
    ask: Ask,
    silence_of: Callable[[Array, list[int], int], float],
) -> tuple[list[int], bool, bool]:
    """A window's answer, whether the next window is told of it, and whether nothing was said."""
    silence = 0.0 if how.silence is None else silence_of(part, begin, len(begin) - len(how.start))
    tokens, temperature = [], None  # type: tuple[list[int], float | None]
    is_silent = False
    for temperature in how.temperatures:
        answer = ask(part, begin, _at(how.config, temperature), count, _rules(how, len(begin)))
        tokens = answer.tokens
        is_bad, is_silent = _judge(answer, temperature, silence, how)
        if not is_bad:
            break
    continues = how.continues and (temperature is None or temperature < 0.5)
    return tokens, continues, is_silent


def _at(config: GenerationConfig, temperature: float | None) -> GenerationConfig:
    """The settings with a temperature; sampling goes without beams."""
    if temperature is None or temperature <= 0:
        return replace(config, do_sample=False, temperature=None)
    return replace(config, do_sample=True, temperature=temperature, num_beams=1)


def _rules(how: Listening, begun: int) -> list[TimestampRules]:
    if not how.writes_times or how.silent is None:
        return []
    return [TimestampRules(how.silent, next(iter(how.config.eos_ids), how.silent), begun, how.latest_first)]


def _judge(answer: Answer, temperature: float | None, silence: float, how: Listening) -> tuple[bool, bool]:
    """Whether an answer is bad, and whether it is of silence."""
    is_bad, tokens = False, answer.tokens
    if how.most_compressed is not None:
        is_bad = compression_ratio(tokens, how.vocabulary) > how.most_compressed
    if how.least_likely is None:
        return is_bad, False
    scores = answer.record.scores
    likelihood = answer.score if answer.parents else average_logprob(scores, tokens, temperature or 0)
    is_unlikely = likelihood < how.least_likely
    if how.silence is not None and is_unlikely and silence > how.silence:
        return False, True
    return is_bad or is_unlikely, False
