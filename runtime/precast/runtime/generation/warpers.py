"""What shapes the distribution that tokens are drawn from, by the formulas of transformers' logits warpers. Each takes
and returns one row's logits, float32 [vocabulary], and keeps at least the `least` likeliest tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from .probabilities import log_softmax, softmax

__all__ = ["epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "top_k", "top_p", "typical_p"]

Array = np.ndarray[Any, Any]

_TOP_H_TOKENS = 100
"""So many of the likeliest tokens are looked at."""


def top_h(logits: Array, share: float) -> Array:
    """Keep the likeliest tokens whose entropy together is at most `share` of the whole (Potraghloo et al. 2025), at
    least one."""
    order = np.argsort(-logits, kind="stable")[:_TOP_H_TOKENS]
    probabilities = softmax(logits[order].astype(np.float64))
    terms = _entropy_terms(probabilities)
    kept = np.cumsum(terms) <= terms.sum() * share
    kept[0] = True
    return _keep_only(logits, order[kept])


def top_k(logits: Array, count: int, least: int = 1) -> Array:
    """Keep the `count` likeliest tokens, and those that tie with the last of them."""
    count = max(count, least)
    return logits if count >= len(logits) else np.where(logits < _at_rank(logits, count), -np.inf, logits)


def top_p(logits: Array, mass: float, least: int = 1) -> Array:
    """Keep the likeliest tokens that together reach `mass` (Holtzman et al. 2020)."""
    possible = np.flatnonzero(logits > -np.inf)
    order = possible[np.argsort(logits[possible], kind="stable")]
    dropped = np.cumsum(softmax(logits[order])) <= 1 - mass
    dropped[-least:] = False
    result: Array = logits.copy()
    result[order[dropped]] = -np.inf
    return result


def min_p(logits: Array, share: float, least: int = 1) -> Array:
    """Keep tokens at least `share` times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = softmax(logits)
    return _drop(logits, probabilities < share * probabilities.max(), least)


def typical_p(logits: Array, mass: float, least: int = 1) -> Array:
    """Keep the tokens whose information is nearest to the entropy and that together reach `mass` (Meister et al.
    2022)."""
    likelihoods = log_softmax(logits)
    probabilities = np.exp(likelihoods)
    with np.errstate(invalid="ignore"):
        entropy = -np.nansum(likelihoods * probabilities)
    distances = np.abs(-likelihoods - entropy)
    order = np.argsort(distances, kind="stable")
    last = min(int((np.cumsum(softmax(logits[order])) < mass).sum()), len(order) - 1)
    dropped = distances[order] > distances[order[last]]
    dropped[:least] = False
    result: Array = logits.copy()
    result[order[dropped]] = -np.inf
    return result


def epsilon_cutoff(logits: Array, epsilon: float, least: int = 1) -> Array:
    """Keep tokens of at least this probability (Hewitt et al. 2022)."""
    return _drop(logits, softmax(logits) < np.float32(epsilon), least)


def eta_cutoff(logits: Array, epsilon: float, least: int = 1) -> Array:
    """Keep tokens of at least a probability that falls with the entropy (Hewitt et al. 2022)."""
    probabilities = softmax(logits)
    entropy = _entropy_terms(probabilities).sum()
    return _drop(logits, probabilities < min(epsilon, np.sqrt(epsilon) * np.exp(-entropy)), least)


def _entropy_terms(probabilities: Array) -> Array:
    result: Array = -probabilities * np.log(np.where(probabilities > 0, probabilities, 1))
    return result


def _at_rank(logits: Array, rank: int) -> Any:
    """The logit of the `rank`th likeliest token."""
    return np.partition(logits, -rank)[-rank]


def _drop(logits: Array, dropped: Array, least: int) -> Array:
    """Forbid tokens but for the `least` likeliest."""
    kept = logits >= _at_rank(logits, min(least, len(logits)))
    return np.where(dropped & ~kept, -np.inf, logits)


def _keep_only(logits: Array, kept: Array) -> Array:
    result: Array = np.full_like(logits, -np.inf)
    result[kept] = logits[kept]
    return result
