"""Logits -> next token. Formulas are those of transformers' logits processors, applied in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .errors import InputError, PrecastError
from .generation import GenerationConfig
from .tensors import to_numpy

__all__ = ["Processors", "Sampler", "check_choice", "check_logits"]

Array = np.ndarray[Any, Any]
Processor = Callable[[Array, Array], Array]


class Processors:
    """What may be chosen next in a row: its tokens so far, int64 [length], and logits or log-probabilities
    [vocabulary] -> the same, changed.

    `prompt_length` is the row's own, `most` the length at which it is full, `source` the tokens that an
    encoder-decoder answers.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt_length: int,
        most: int,
        extra: Sequence[Processor] = (),
        source: Array | None = None,
    ) -> None:
        self._steps = [*_penalties(config, prompt_length, most, source), *map(_one_row, extra)]
        if config.do_sample:
            self._steps += _warpers(config)
        if config.renormalize_logits and config.beams > 1:
            # Alone, a row is chosen alike from logits and from their log-probabilities.
            self._steps.append(lambda _, logits: log_softmax(logits))

    def __call__(self, tokens: Array, logits: Array) -> Array:
        if self._steps:
            logits = logits.astype(np.float32)
            for process in self._steps:
                logits = process(tokens, logits)
        return logits


class Sampler:
    """Chooses the next token of one row from its tokens so far, int64 [length], and its logits [vocabulary].

    `generator` draws; without one the likeliest token is taken.
    """

    def __init__(self, process: Processors, generator: np.random.Generator | None) -> None:
        self._process, self._generator = process, generator

    def __call__(self, tokens: Array, logits: Array) -> int:
        """The next token's id."""
        logits = self._process(tokens, logits)
        likeliest = int(logits.argmax())
        check_choice(logits[likeliest])
        return likeliest if self._generator is None else _draw(self._generator, logits)


def check_logits(logits: Array, step: int) -> None:
    """Raise PrecastError where the logits of a row's `step`th new token hold NaN."""
    if np.isnan(logits.max()):
        raise PrecastError(
            f"The model's logits for new token {step} hold NaN, so no token is the likeliest: some number in it is too "
            f"large for its precision. Export it with --dtype float32, or ask it something else."
        )


def check_choice(best: Any) -> None:
    """Raise InputError where the best of logits or scores is none: every token is ruled out."""
    if best == -np.inf:
        raise InputError(
            "No token may come next: suppress_tokens, bad_words_ids, no_repeat_ngram_size and logits_processor "
            "together rule out all. Leave one of them out."
        )


def _draw(generator: np.random.Generator, logits: Array) -> int:
    if logits.max() == np.inf:
        # Certain is what is infinite.
        logits = np.where(logits == np.inf, np.float32(0), np.float32(-np.inf))
    possible = np.flatnonzero(logits > -np.inf)
    return int(generator.choice(possible, p=_softmax(logits[possible].astype(np.float64))))


def _one_row(process: Processor) -> Processor:
    """The caller's processors take batches, [1, length] and [1, vocabulary], as transformers' do.

    Raises InputError for an answer that is no logits.
    """

    def of_one_row(tokens: Array, logits: Array) -> Array:
        # A copy: what is done to it must not change the row.
        found: Array = np.asarray(to_numpy(process(tokens[None].copy(), logits[None])))
        name, wanted = getattr(process, "__name__", type(process).__name__), [1, len(logits)]
        if list(found.shape) != wanted or found.dtype.kind not in "fiu":
            raise InputError(
                f"The logits_processor {name} has to return logits, float32 {wanted}; it returned {found.dtype} "
                f"{list(found.shape)}."
            )
        if np.isnan(found).any():
            raise InputError(f"The logits_processor {name} returned NaN among its logits.")
        row: Array = found[0].astype(np.float32)
        return row

    return of_one_row


def _penalties(config: GenerationConfig, prompt_length: int, most: int, source: Array | None) -> Iterator[Processor]:
    if (penalty := config.repetition_penalty) is not None and penalty != 1:
        yield lambda tokens, logits: repetition_penalty(tokens, logits, penalty)
    if size := config.no_repeat_ngram_size:
        yield lambda tokens, logits: no_ngram_of(tokens, tokens, logits, size)
    if source is not None and (from_source := config.encoder_no_repeat_ngram_size):
        yield lambda tokens, logits: no_ngram_of(source, tokens, logits, from_source)
    if words := [word for word in config.bad_words_ids or () if word not in [[end] for end in config.eos_ids]]:
        yield lambda tokens, logits: no_bad_words(tokens, logits, words)
    least = config.min_length or 0
    if config.min_new_tokens is not None:
        least = prompt_length + config.min_new_tokens
    if least > prompt_length and config.eos_ids:
        yield lambda tokens, logits: minimum_length(tokens, logits, least, config.eos_ids)
    yield from _forced(config, prompt_length, most)


def _forced(config: GenerationConfig, prompt_length: int, most: int) -> Iterator[Processor]:
    """What is fixed at a row's beginning and end, and what is never said."""
    if (first := config.forced_bos_token_id) is not None:
        yield lambda tokens, logits: only(logits, [first]) if len(tokens) == 1 else logits
    if last := config.last_ids:
        yield lambda tokens, logits: only(logits, last) if len(tokens) == most - 1 else logits
    if never := config.suppress_tokens:
        yield lambda _, logits: without(logits, never)
    if not_first := config.begin_suppress_tokens:
        start = prompt_length + (prompt_length == 1 and first is not None)
        yield lambda tokens, logits: without(logits, not_first) if len(tokens) == start else logits


def _warpers(config: GenerationConfig) -> list[Processor]:
    found: list[Processor] = []
    if (temperature := config.temperature) is not None and temperature != 1:
        found.append(lambda _, logits: logits / np.float32(temperature))
    limit = 50 if config.top_k is None else config.top_k
    if limit:
        found.append(lambda _, logits: top_k(logits, limit))
    if (mass := config.top_p) is not None and mass < 1:
        found.append(lambda _, logits: top_p(logits, mass))
    if (share := config.min_p) is not None:
        found.append(lambda _, logits: min_p(logits, share))
    return found


def repetition_penalty(tokens: Array, logits: Array, penalty: float) -> Array:
    """Divide positive and multiply negative logits of tokens that occurred (Keskar et al. 2019)."""
    penalised: Array = logits.copy()
    seen = logits[tokens]
    penalised[tokens] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return penalised


def no_ngram_of(history: Array, tokens: Array, logits: Array, size: int) -> Array:
    """Forbid what would complete a sequence of `size` tokens that occurs in `history`."""
    if len(history) < size or len(tokens) < size - 1:
        return logits
    windows = np.lib.stride_tricks.sliding_window_view(history, size)
    tail = tokens[len(tokens) - size + 1 :]
    return without(logits, windows[(windows[:, :-1] == tail).all(1), -1].tolist())


def no_bad_words(tokens: Array, logits: Array, words: Sequence[Sequence[int]]) -> Array:
    """Forbid what would complete one of these sequences of tokens."""
    ends = [word[-1] for word in words if tokens[len(tokens) - len(word) + 1 :].tolist() == list(word[:-1])]
    return without(logits, ends)


def minimum_length(tokens: Array, logits: Array, least: int, eos_ids: Sequence[int]) -> Array:
    """Forbid the end before `least` tokens."""
    return without(logits, eos_ids) if len(tokens) < least else logits


def without(logits: Array, ids: Sequence[int]) -> Array:
    """Forbid these tokens; ids outside the vocabulary never come anyway."""
    result: Array = logits.copy()
    result[[token for token in ids if 0 <= token < len(logits)]] = -np.inf
    return result


def only(logits: Array, ids: Sequence[int]) -> Array:
    """Forbid all but these tokens, which become equally likely."""
    result: Array = np.full_like(logits, -np.inf)
    result[list(ids)] = 0
    return result


def top_k(logits: Array, count: int) -> Array:
    """Keep the `count` likeliest tokens, and those that tie with the last of them."""
    if count >= len(logits):
        return logits
    threshold = np.partition(logits, -count)[-count]
    return np.where(logits < threshold, -np.inf, logits)


def top_p(logits: Array, mass: float) -> Array:
    """Keep the likeliest tokens that together reach `mass` (Holtzman et al. 2020), at least one."""
    possible = np.flatnonzero(logits > -np.inf)
    order = possible[np.argsort(logits[possible], kind="stable")]
    dropped = np.cumsum(_softmax(logits[order])) <= 1 - mass
    dropped[-1] = False
    result: Array = logits.copy()
    result[order[dropped]] = -np.inf
    return result


def min_p(logits: Array, share: float) -> Array:
    """Keep tokens at least `share` times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = _softmax(logits)
    return np.where(probabilities < share * probabilities.max(), -np.inf, logits)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, in float32."""
    shifted = logits.astype(np.float32) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max())
    result: Array = shifted / shifted.sum()
    return result
