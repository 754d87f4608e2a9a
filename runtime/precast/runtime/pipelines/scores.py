"""Scores -> labels: classes by the checkpoint's names, with the probabilities of their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UsageError
from ..generation.probabilities import sigmoid, softmax

__all__ = ["top_indices", "classify_row", "label", "labels"]

Array = np.ndarray[Any, Any]


def label(config: dict[str, Any], index: int) -> str:
    """The checkpoint's name of class `index`; LABEL_0 and so on where it has none, as in transformers."""
    return labels(config).get(index, f"LABEL_{index}")


def labels(config: dict[str, Any]) -> dict[int, str]:
    """The names of classes by index; none where the configuration has no usable ones."""
    found = config.get("id2label")
    names = found if isinstance(found, dict) else {}
    return {int(index): str(name) for index, name in names.items() if index.isdecimal()}


def top_indices(scores: Array, count: int | None) -> list[int]:
    """The indices of the `count` highest scores, or all, from the highest down."""
    return [int(index) for index in np.argsort(-scores, kind="stable")[:count]]


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}


def classify_row(config: dict[str, Any], logits: Array, function: str | None = None) -> list[dict[str, Any]]:
    """All labels with their scores, the highest first. Raises UsageError for an unknown function."""
    if function is not None and function not in _FUNCTIONS:
        raise UsageError(f"function_to_apply={function!r} is not known; choose one of: {', '.join(_FUNCTIONS)}.")
    scores = _FUNCTIONS[function or _function_of(config, len(logits))](logits)
    return [{"label": label(config, index), "score": float(scores[index])} for index in top_indices(scores, None)]


def _function_of(config: dict[str, Any], labels: int) -> str:
    problem = config.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or labels == 1 else "softmax"
