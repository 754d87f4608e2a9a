"""Weight-only quantization: the model's linear layers on a grid, before it is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .calibration import blocks, hessians
from .linear import Packed, QuantizedEmbedding, QuantizedLinear
from .methods import METHODS, WHOLE_ROW, Scheme, get_method
from .recipe import Layer, Recipe, find_layers
from .scheme import Grid, find_grid, stacked

__all__ = ["METHODS", "Recipe", "Scheme", "quantize"]

SOURCE_BITS = (4, 8)
"""The grids of a source that can be kept, finest last."""
AT_ONCE = 2**20
"""Weights that are rounded together."""


def quantize(
    model: nn.Module,
    recipe: Recipe,
    calibration: Sequence[Tensor] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Replace the layers of `model` in place, each freed as soon as its successor stands.

    Args:
        calibration: rows of token ids [S], for methods that are calibrated.
        progress: told how many layers of how many are done.

    Returns:
        Per layer, in words, the grid that it is on now.
    """
    method, done = get_method(recipe.method), dict[str, str]()
    layers = {layer.name: layer for layer in find_layers(model, recipe.skipped)}
    for names in blocks(list(layers)):
        asked = [name for name in names if layers[name].linear] if method.is_calibrated else []
        learned = hessians(model, asked, calibration) if asked else {}
        for name in names:
            layer = layers.pop(name)
            grid, words = _grid(layer, recipe, learned.pop(name, None))
            _replace(model, layer, Packed(grid))
            done[name] = words
            progress(len(done), len(done) + len(layers))
    return done


@torch.no_grad()
def _grid(layer: Layer, recipe: Recipe, hessian: Tensor | None) -> tuple[Grid, str]:
    """The source's own grid if that is to be kept and there is one, otherwise what the method makes."""
    asked = recipe.scheme_for(layer.name)
    scheme = asked if asked.group != WHOLE_ROW else replace(asked, group=layer.weight.shape[1])
    if recipe.keeps_source:
        for bits in SOURCE_BITS:
            found = _by_rows(layer.weight, partial(find_grid, group=scheme.group, bits=bits))
            if found is not None and (found.offsets is None or _has_room(layer, scheme.group)):
                return found, f"the source's int{bits} in groups of {scheme.group}"
    if scheme.zero == "free" and not _has_room(layer, scheme.group):
        scheme = replace(scheme, zero="whole")
    method = get_method(recipe.method)
    if method.is_calibrated:
        return method.quantize(layer.weight, scheme, hessian), str(_named(asked, scheme))
    grid = _by_rows(layer.weight, lambda rows: method.quantize(rows, scheme, None))
    assert grid is not None, "a method always finds a grid"
    return grid, str(_named(asked, scheme))


def _named(asked: Scheme, scheme: Scheme) -> Scheme:
    """What was done, by the group that was asked for: rows of different lengths are one scheme."""
    return replace(scheme, group=asked.group)


def _by_rows(weight: Tensor, function: Callable[[Tensor], Grid | None]) -> Grid | None:
    """The grids of parts of the rows, joined, or None if one has none. What a method needs meanwhile is many times what
    it works on, and an embedding can be most of a model."""
    parts = []
    for rows in weight.split(max(1, AT_ONCE // weight.shape[1])):
        if (part := function(rows)) is None:
            return None
        parts.append(part)
    return stacked(parts)


def _has_room(layer: Layer, group: int) -> bool:
    """Offsets are held in columns behind the others: a table has none, and they begin where whole groups end."""
    return layer.table is None and layer.weight.shape[1] % group == 0


def _replace(model: nn.Module, layer: Layer, packed: Packed) -> None:
    if layer.linear is not None:
        model.set_submodule(layer.linear, QuantizedLinear(packed, layer.bias))
    if layer.table is not None:
        model.set_submodule(layer.table, QuantizedEmbedding(packed))
