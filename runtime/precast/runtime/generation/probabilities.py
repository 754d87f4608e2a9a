"""Logits -> probabilities, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["log_softmax", "sigmoid", "softmax"]

Array = np.ndarray[Any, Any]


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis, in the dtype of the logits."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = shifted / shifted.sum(-1, keepdims=True)
    return result


def log_softmax(logits: Array) -> Array:
    """Log-probabilities along the last axis, in float32."""
    shifted = logits.astype(np.float32) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def sigmoid(logits: Array) -> Array:
    """Independent probabilities, in the dtype of the logits; never overflows."""
    result: Array = 0.5 * (1 + np.tanh(0.5 * logits))
    return result
