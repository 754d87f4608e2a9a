"""The formulas that change logits before a token is chosen: those of transformers' logits processors, and OpenAI's
penalties. Each takes and returns one row's logits or log-probabilities, float32 [vocabulary]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "allow_only",
    "decay_length",
    "forbid_tokens",
    "frequency_penalties",
    "guide",
    "no_bad_words",
    "no_ngram_of",
    "replace_invalid",
    "repetition_penalty",
    "sequence_bias",
    "token_bias",
]

from .probabilities import log_softmax

Array = np.ndarray[Any, Any]


def guide(logits: Array, unconditional: Array, scale: float) -> Array:
    """Classifier-free guidance (Sanchez et al. 2023): move log-probabilities away from those without the prompt, by a
    factor."""
    without = log_softmax(unconditional)
    return np.float32(scale) * (log_softmax(logits) - without) + without


def token_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """Add numbers to the logits of tokens."""
    result: Array = logits.copy()
    result[list(bias)] += np.array(list(bias.values()), np.float32)
    return result


def sequence_bias(tokens: Array, logits: Array, bias: Sequence[tuple[Sequence[int], float]]) -> Array:
    """Add numbers to the logits of tokens that would complete sequences."""
    result: Array = logits.copy()
    for sequence, value in bias:
        if _ends_with(tokens, sequence[:-1]):
            result[sequence[-1]] += np.float32(value)
    return result


def repetition_penalty(tokens: Array, logits: Array, penalty: float) -> Array:
    """Divide positive and multiply negative logits of tokens that occurred (Keskar et al. 2019)."""
    penalised: Array = logits.copy()
    seen = logits[tokens]
    penalised[tokens] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return penalised


def frequency_penalties(new: Array, logits: Array, presence: float, frequency: float) -> Array:
    """Subtract `presence` from the logits of the tokens that were generated, and `frequency` for each time that they
    were (OpenAI's API reference)."""
    counts = np.bincount(new, minlength=len(logits))
    result: Array = logits - (presence * (counts > 0) + frequency * counts).astype(np.float32)
    return result


def no_ngram_of(history: Array, tokens: Array, logits: Array, size: int) -> Array:
    """Forbid tokens that would complete an n-gram of `size` tokens that occurs in `history`."""
    if len(history) < size or len(tokens) < size - 1:
        return logits
    windows = np.lib.stride_tricks.sliding_window_view(history, size)
    tail = tokens[len(tokens) - size + 1 :]
    return forbid_tokens(logits, windows[(windows[:, :-1] == tail).all(1), -1].tolist())


def no_bad_words(tokens: Array, logits: Array, words: Sequence[Sequence[int]]) -> Array:
    """Forbid tokens that would complete one of these sequences."""
    return forbid_tokens(logits, [word[-1] for word in words if _ends_with(tokens, word[:-1])])


def forbid_tokens(logits: Array, ids: Sequence[int]) -> Array:
    """Forbid these tokens; ids outside the vocabulary never come anyway."""
    result: Array = logits.copy()
    result[[token for token in ids if 0 <= token < len(logits)]] = -np.inf
    return result


def allow_only(logits: Array, ids: Sequence[int]) -> Array:
    """Forbid all but these tokens, which become equally likely."""
    result: Array = np.full_like(logits, -np.inf)
    result[list(ids)] = 0
    return result


def replace_invalid(logits: Array) -> Array:
    """NaN becomes 0, and what is infinite the largest or smallest number that is not."""
    limits = np.finfo(np.float32)
    result: Array = np.clip(np.where(np.isnan(logits), np.float32(0), logits), limits.min, limits.max)
    return result


def decay_length(logits: Array, ends: Sequence[int], factor: float, late: int) -> Array:
    """Raise the logits of end-of-sequence tokens, by the more the more tokens a row is `late`."""
    result: Array = logits.copy()
    held = logits[list(ends)]
    with np.errstate(over="ignore"):
        rise = np.abs(held) * (np.power(np.float32(factor), np.float32(late)) - 1)
    result[list(ends)] = held + np.where(np.isfinite(held), rise, np.float32(0))
    return result


def _ends_with(tokens: Array, part: Sequence[int]) -> bool:
    return len(tokens) >= len(part) and tokens[len(tokens) - len(part) :].tolist() == list(part)
