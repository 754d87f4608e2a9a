"""Gemma 3n computes the quantile of a normal distribution in the graph; it is a constant."""

from __future__ import annotations

from contextlib import AbstractContextManager
from statistics import NormalDist
from typing import Any

from torch import Tensor, nn
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from .patching import replaced

__all__ = ["traceable"]


def traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace what keeps only the largest activations of sparse layers."""
    return replaced(model, Gemma3nTextMLP, "_gaussian_topk", _largest)


def _largest(layer: Gemma3nTextMLP) -> Any:
    deviations = NormalDist().inv_cdf(layer.activation_sparsity) if layer.activation_sparsity else 0.0

    def largest(inputs: Tensor) -> Tensor:
        cutoff = inputs.mean(-1, keepdim=True) + deviations * inputs.std(-1, keepdim=True, unbiased=False)
        return (inputs - cutoff).relu()

    return largest
