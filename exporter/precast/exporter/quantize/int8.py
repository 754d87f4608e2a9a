"""Weights and activations in 8 bits: ranges from calibration samples, smoothing, and the layers that lose too much
by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .activations import Call, InputGroup, choose_range, observe_inputs
from .int8_linear import Int8Linear, Int8Weight
from .mixture import count_affordable
from .recipe import Layer
from .smooth import choose_balance, fold_into_norms

__all__ = ["Meter", "quantize_activations"]


Family: TypeAlias = Sequence[str]


class Meter(Protocol):
    """Measures how far a model's answers are from those that it gave at first."""

    def divergence(self) -> float: ...


def quantize_activations(
    model: nn.Module,
    layers: Sequence[Layer],
    calls: Sequence[Call],
    meter: Meter,
    budget: float,
    smooth: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    is_static: bool,
) -> dict[str, str]:
    """Replace linear layers of `model` by those that multiply in 8 bits, as far as its answers stay within `budget` of
    the meter; the others are left to be rounded in another way.

    Args:
        calls: calibration samples.
        smooth: see `choose_balance`.
        is_static: one range of activations per layer, from the samples, rather than a scale for each token.

    Returns:
        Per layer that was replaced a description, for people.
    """
    by_name = {layer.name: layer for layer in layers}
    groups = observe_inputs(model, calls, list(by_name))
    for done, group in enumerate(groups):
        progress(done, 2 * len(groups))
        group.balance = choose_balance(group, [by_name[name] for name in group.names], smooth, is_static=is_static)
    fold_into_norms(model, calls[0], groups, by_name)
    made: dict[str, Int8Linear] = {}
    for done, group in enumerate(groups):
        progress(len(groups) + done, 2 * len(groups))
        made |= _round_group(group, by_name, is_static)
    chosen = _Chooser(model, made, meter, budget).choose([group.names for group in groups])
    for name in chosen:
        model.set_submodule(name, made[name])
    words = f"int8 weights and activations, a scale per {'tensor' if is_static else 'token'}"
    return dict.fromkeys(chosen, words)


@torch.no_grad()
def _round_group(group: InputGroup, layers: Mapping[str, Layer], is_static: bool) -> dict[str, Int8Linear]:
    balance = group.balance
    found = choose_range(group.sample if balance is None else group.sample * balance) if is_static else None
    made = {}
    for name in group.names:
        layer = layers[name]
        weight = Int8Weight.round(layer.weight if balance is None else layer.weight / balance)
        made[name] = Int8Linear(weight, layer.bias, balance, found)
        _correct_bias(made[name], layer, group.sample)
    return made


def _correct_bias(rounded: Int8Linear, layer: Layer, sample: Tensor) -> None:
    """Take the mean of what rounding changes off the outputs: it is the same for every token, so that it would add up
    where other errors cancel out."""
    expected = nn.functional.linear(sample, layer.weight.float(), layer.bias)
    error = (rounded(sample) - expected).mean(0)
    bias = -error if layer.bias is None else layer.bias - error
    rounded.bias = nn.Parameter(bias, requires_grad=False)


class _Chooser:
    """Chooses the families of layers, each of which reads one tensor, that are replaced within a budget."""

    def __init__(self, model: nn.Module, made: Mapping[str, nn.Module], meter: Meter, budget: float) -> None:
        self._model, self._made, self._meter, self._budget = model, made, meter, budget

    def choose(self, families: Sequence[Family]) -> list[str]:
        """The names of the layers: all, if that is within the budget, or without the families that cost most."""
        if not families or self._cost(families) <= self._budget:
            return [name for family in families for name in family]
        costs = self._cost_each(families)
        order = sorted(range(len(families)), key=lambda index: costs[index])
        count = min(len(order) - 1, count_affordable([costs[index] for index in order], self._budget))
        while count and self._cost([families[index] for index in order[:count]]) > self._budget:
            # Together they cost more than one by one: a tenth fewer each time, so that the search ends soon.
            count = min(count - 1, int(0.9 * count))
        return [name for index in order[:count] for name in families[index]]

    def _cost(self, families: Sequence[Family]) -> float:
        with _replaced(self._model, {name: self._made[name] for family in families for name in family}):
            return self._meter.divergence()

    def _cost_each(self, families: Sequence[Family]) -> list[float]:
        """What each costs alone; in equal parts what all blocks' together cost, where that is little."""
        kinds: dict[str, list[int]] = {}
        for index, family in enumerate(families):
            kinds.setdefault(re.sub(r"\d+", "", family[0]), []).append(index)
        costs = [0.0] * len(families)
        for indices in kinds.values():
            together = self._cost([families[index] for index in indices])
            is_little = together <= self._budget / len(kinds)
            for index in indices:
                costs[index] = together / len(indices) if is_little else self._cost([families[index]])
        return costs


@contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this block these modules stand for the model's own."""
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
