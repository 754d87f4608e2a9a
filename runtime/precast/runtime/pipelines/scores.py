"""Logits -> probabilities, indices -> labels."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["best", "label", "labels", "sigmoid", "softmax"]

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
    return labels(config).get(index, f"LABEL_{index}")


def labels(config: dict[str, Any]) -> dict[int, str]:
    """The names of classes, by their numbers; none where the configuration has none that are."""
    found = config.get("id2label")
    names = found if isinstance(found, dict) else {}
    return {int(index): str(name) for index, name in names.items() if index.isdecimal()}


def best(scores: Array, count: int | None) -> list[int]:
    """The indices of the `count` highest scores, or all, from the highest down."""
    return [int(index) for index in np.argsort(-scores, kind="stable")[:count]]
