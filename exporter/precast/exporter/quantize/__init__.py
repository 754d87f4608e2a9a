"""Weight-only quantization of a model's linear layers and embedding, before it is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .calibration import Calibration, group_blocks
from .linear import Packed, QuantizedEmbedding, QuantizedLinear
from .methods import METHODS, Scheme, get_method
from .recipe import Layer, Recipe, find_layers
from .scheme import QuantizedWeight, apply_by_rows, detect_quantization

__all__ = ["METHODS", "Recipe", "Scheme", "quantize"]

SOURCE_BITS = (4, 8)
"""Bits of a source's own quantization that can be kept, most bits last."""


def quantize(
    model: nn.Module,
    recipe: Recipe,
    calibration: Sequence[Mapping[str, Tensor]] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Quantize the layers of `model` in place; each layer is freed as soon as it is replaced.

    Args:
        calibration: inputs of the model, for methods that are calibrated.
        progress: called with the number of layers done and the number of all layers.

    Returns:
        Per layer a description of its quantization, for people.
    """
    method, done = get_method(recipe.method), dict[str, str]()
    layers = {layer.name: layer for layer in find_layers(model, recipe.skipped)}
    blocks = group_blocks(list(layers))
    text = Calibration(model, calibration, blocks)
    for block, names in blocks.items():
        asked = [name for name in names if layers[name].linear] if method.is_calibrated else []
        learned = text.collect_hessians(asked) if asked else {}
        for name in names:
            layer = layers.pop(name)
            weight, words = _quantize_layer(layer, recipe, learned.pop(name, None))
            _replace(model, layer, Packed(weight))
            done[name] = words
            progress(len(done), len(done) + len(layers))
        text.finish(block)
    return done


@torch.no_grad()
def _quantize_layer(layer: Layer, recipe: Recipe, hessian: Tensor | None) -> tuple[QuantizedWeight, str]:
    """Keep the source's own quantization if the recipe says so and there is one; otherwise apply the method."""
    asked = recipe.scheme_for(layer.name)
    scheme = layer.fit_scheme(asked)
    if recipe.keeps_source:
        for bits in SOURCE_BITS:
            found = apply_by_rows(layer.weight, partial(detect_quantization, group=scheme.group, bits=bits))
            if found is not None and (found.offsets is None or layer.can_hold_offsets(scheme.group)):
                return found, f"the source's int{bits} in groups of {scheme.group}"
    method = get_method(recipe.method)
    if method.is_calibrated and hessian is not None:
        return method.quantize(layer.weight, scheme, hessian), str(_with_asked_group(asked, scheme))
    weight = apply_by_rows(layer.weight, lambda rows: method.quantize(rows, scheme, None))
    assert weight is not None, "a method always has a result"
    return weight, str(_with_asked_group(asked, scheme))


def _with_asked_group(asked: Scheme, scheme: Scheme) -> Scheme:
    """The scheme with its group size as asked for: whole rows of different lengths are described alike."""
    return replace(scheme, group=asked.group)


def _replace(model: nn.Module, layer: Layer, packed: Packed) -> None:
    if layer.linear is not None:
        model.set_submodule(layer.linear, QuantizedLinear(packed, layer.bias))
    for table in layer.tables:
        model.set_submodule(table, QuantizedEmbedding(packed))
