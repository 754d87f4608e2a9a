"""Logits -> probabilities, indices -> labels."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["best", "label", "sigmoid", "softmax"]

Array = np.ndarray[Any, Any]


def softmax(logits: Array) -> Array:
    """Probabilities along the last dimension."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = shifted / shifted.sum(-1, keepdims=True)
    return result


def sigmoid(logits: Array) -> Array:
    """Independent probabilities; never overflows."""
    result: Array = 0.5 * (1 + np.tanh(0.5 * logits))
    return result


def label(config: dict[str, Any], index: int) -> str:
    """What the checkpoint calls class `index`; LABEL_0 and so on where it has no names, as in transformers."""
    return str(config.get("id2label", {}).get(str(index), f"LABEL_{index}"))


def best(scores: Array, count: int | None) -> list[int]:
    """The indices of the `count` highest scores, or all, from the highest down."""
    return [int(index) for index in np.argsort(-scores, kind="stable")[:count]]
