"""Logits -> next token. Formulas are those of transformers' logits processors, applied in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .generation import GenerationConfig

__all__ = ["Sampler"]

Array = np.ndarray[Any, Any]
Processor = Callable[[Array, Array], Array]


class Sampler:
    """Chooses the next token of one row from its tokens so far, int64 [length], and its logits [vocabulary]."""

    def __init__(
        self, config: GenerationConfig, prompt: Array, generator: np.random.Generator, extra: Sequence[Processor] = ()
    ) -> None:
        self._generator = generator if config.do_sample else None
        self._processors = [*_penalties(config, len(prompt)), *map(_one_row, extra)]
        if config.do_sample:
            self._processors += _warpers(config)

    def __call__(self, tokens: Array, logits: Array) -> int:
        """The next token's id."""
        if self._processors:
            logits = logits.astype(np.float32)
            for process in self._processors:
                logits = process(tokens, logits)
        return int(logits.argmax()) if self._generator is None else _draw(self._generator, logits)


def _draw(generator: np.random.Generator, logits: Array) -> int:
    possible = np.flatnonzero(logits > -np.inf)
    return int(generator.choice(possible, p=_softmax(logits[possible].astype(np.float64))))


def _one_row(process: Processor) -> Processor:
    """The caller's processors take batches, [1, length] and [1, vocabulary], as transformers' do."""
    return lambda tokens, logits: np.asarray(process(tokens[None], logits[None]))[0]


def _penalties(config: GenerationConfig, prompt_length: int) -> list[Processor]:
    found: list[Processor] = []
    if (penalty := config.repetition_penalty) is not None and penalty != 1:
        found.append(lambda tokens, logits: repetition_penalty(tokens, logits, penalty))
    if size := config.no_repeat_ngram_size:
        found.append(lambda tokens, logits: no_repeat_ngram(tokens, logits, size))
    least = config.min_length or 0
    if config.min_new_tokens is not None:
        least = prompt_length + config.min_new_tokens
    if least > prompt_length and config.eos_ids:
        found.append(lambda tokens, logits: minimum_length(tokens, logits, least, config.eos_ids))
    return found


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


def no_repeat_ngram(tokens: Array, logits: Array, size: int) -> Array:
    """Forbid what would complete a sequence of `size` tokens that occurred."""
    if len(tokens) < size:
        return logits
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    tail = tokens[len(tokens) - size + 1 :]
    banned = windows[(windows[:, :-1] == tail).all(1), -1]
    result: Array = logits.copy()
    result[banned] = -np.inf
    return result


def minimum_length(tokens: Array, logits: Array, least: int, eos_ids: Sequence[int]) -> Array:
    """Forbid the end before `least` tokens."""
    if len(tokens) >= least:
        return logits
    result: Array = logits.copy()
    result[list(eos_ids)] = -np.inf
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


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max())
    result: Array = shifted / shifted.sum()
    return result
