"""SmoothQuant (Xiao et al. 2023): activations are divided, and weights multiplied, by a factor per channel, so that
channels with large activations do not take the steps from all others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .activations import Call, InputGroup, choose_range, replay
from .int8_linear import Int8Weight, round_activations
from .recipe import Layer

__all__ = ["choose_balance", "fold_into_norms"]

EXPONENTS = (0.3, 0.5, 0.65, 0.8)
"""What `auto` tries beside no smoothing: the exponent of activations in the factors."""
SAMPLE_SIZE = 2**17
"""Weights that exponents are compared on."""
LEAST = 1e-5
"""The lower bound of a channel's size, relative to the largest channel's."""
SAME = 1e-3
"""The largest difference, relative to the largest number, for folded factors to have changed nothing."""


def choose_balance(group: InputGroup, layers: Sequence[Layer], asked: str, *, is_static: bool) -> Tensor | None:
    """What multiplies the group's input, and divides the weights, [K]; None for nothing. `asked` is "none", an
    exponent, or "auto" for the one with the least error of the layers' outputs on the group's sample."""
    if asked == "none":
        return None
    weight = torch.cat([layer.weight.float() for layer in layers])
    sizes = _clamp_small(group.largest), _clamp_small(weight.abs().amax(0))
    if asked != "auto":
        return _balance(*sizes, float(asked))
    part = weight[:: -(-weight.numel() // SAMPLE_SIZE)]
    candidates = [None, *(_balance(*sizes, exponent) for exponent in EXPONENTS)]
    return min(candidates, key=partial(_output_error, group.sample, part, is_static))


def _balance(inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
    factors = inputs**exponent / weights ** (1 - exponent)
    return factors.log().mean().exp() / factors


def _clamp_small(sizes: Tensor) -> Tensor:
    return sizes.clamp(min=max(float(sizes.max()) * LEAST, torch.finfo(torch.float32).tiny))


def _output_error(sample: Tensor, weight: Tensor, is_static: bool, balance: Tensor | None) -> float:
    x, w = (sample, weight) if balance is None else (sample * balance, weight / balance)
    integers, scale = round_activations(x, *(choose_range(x) if is_static else (None, None)))
    error = (integers * scale) @ Int8Weight.round(w).dequantize().T - x @ w.T
    return float(error.square().sum())


@torch.no_grad()
def fold_into_norms(model: nn.Module, call: Call, groups: Sequence[InputGroup], layers: Mapping[str, Layer]) -> None:
    """Multiply the balance of inputs into the normalizations that these come from, and divide the layers' weights by
    it, so that it costs nothing.

    That cannot be where somebody else reads a normalization's output, or where it computes with its weight in a way of
    its own: so those of all blocks that have one name are folded together, and stay so if the model still answers the
    same.
    """
    expected = _numbers(model, call)
    families: dict[str, list[_Fold]] = {}
    for group in groups:
        if group.norm and group.balance is not None:
            fold = _Fold(group, model.get_submodule(group.norm), [layers[name].weight for name in group.names])
            families.setdefault(re.sub(r"\d+", "", group.norm), []).append(fold)
    for family in families.values():
        for fold in family:
            fold.scale(1.0)
        if _is_same(_numbers(model, call), expected):
            for fold in family:
                fold.group.fold()
        else:
            for fold in family:
                fold.scale(-1.0)


class _Fold(NamedTuple):
    """A balanced group, the normalization that it reads, and the weights of its layers."""

    group: InputGroup
    norm: Any
    weights: Sequence[Tensor]

    def scale(self, exponent: float) -> None:
        """Multiply the normalization's outputs by the balance, and divide the layers' columns; or undo it, by -1."""
        assert self.group.balance is not None
        factors = self.group.balance**exponent
        for parameter in (self.norm.weight, getattr(self.norm, "bias", None)):
            if parameter is not None:
                parameter.mul_(factors)
        for weight in self.weights:
            weight.div_(factors)


def _numbers(model: nn.Module, call: Call) -> list[Tensor]:
    """All that a model answers to a sample, but for whole numbers."""
    leaves = tree_leaves(dict(replay(model, call)))
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _is_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        bool((one - other).abs().max() <= SAME * other.abs().max()) for one, other in zip(found, expected, strict=True)
    )
