"""Gemma 3n computes a quantile of the normal distribution in its forward pass; here it is a constant of the graph."""

from __future__ import annotations

from contextlib import AbstractContextManager
from statistics import NormalDist
from typing import Any

from torch import Tensor, nn
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the method that keeps only the largest activations of sparse layers."""
    return replace_method(model, Gemma3nTextMLP, "_gaussian_topk", _make_largest)


def _make_largest(layer: Gemma3nTextMLP) -> Any:
    deviations = NormalDist().inv_cdf(layer.activation_sparsity) if layer.activation_sparsity else 0.0

    def largest(inputs: Tensor) -> Tensor:
        cutoff = inputs.mean(-1, keepdim=True) + deviations * inputs.std(-1, keepdim=True, unbiased=False)
        return (inputs - cutoff).relu()

    return largest
