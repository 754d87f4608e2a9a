"""Weight-only quantization of a model's linear layers and embedding, before it is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .calibration import Calibration, group_blocks
from .linear import Packed, QuantizedEmbedding, QuantizedLinear
from .methods import METHODS, WHOLE_ROW, Scheme, get_method
from .recipe import Layer, Recipe, find_layers
from .scheme import QuantizedWeight, detect_quantization, stack_rows

__all__ = ["METHODS", "Recipe", "Scheme", "quantize"]

SOURCE_BITS = (4, 8)
"""Bits of a source's own quantization that can be kept, most bits last."""
CHUNK = 2**20
"""Weights that are quantized at a time."""


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
    scheme = asked if asked.group != WHOLE_ROW else replace(asked, group=layer.weight.shape[1])
    if recipe.keeps_source:
        for bits in SOURCE_BITS:
            found = _apply_by_rows(layer.weight, partial(detect_quantization, group=scheme.group, bits=bits))
            if found is not None and (found.offsets is None or _can_hold_offsets(layer, scheme.group)):
                return found, f"the source's int{bits} in groups of {scheme.group}"
    if scheme.zero_point == "float" and not _can_hold_offsets(layer, scheme.group):
        scheme = replace(scheme, zero_point="integer")
    method = get_method(recipe.method)
    if method.is_calibrated:
        return method.quantize(layer.weight, scheme, hessian), str(_with_asked_group(asked, scheme))
    weight = _apply_by_rows(layer.weight, lambda rows: method.quantize(rows, scheme, None))
    assert weight is not None, "a method always has a result"
    return weight, str(_with_asked_group(asked, scheme))


def _with_asked_group(asked: Scheme, scheme: Scheme) -> Scheme:
    """The scheme with its group size as asked for: whole rows of different lengths are described alike."""
    return replace(scheme, group=asked.group)


def _apply_by_rows(weight: Tensor, function: Callable[[Tensor], QuantizedWeight | None]) -> QuantizedWeight | None:
    """Quantize a chunk of rows at a time and join the results; None if a chunk has none.

    A method needs many times the memory of its input, and an embedding can be most of a model.
    """
    parts = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        if (part := function(rows)) is None:
            return None
        parts.append(part)
    return stack_rows(parts)


def _can_hold_offsets(layer: Layer, group: int) -> bool:
    """Offset columns need K divisible by the group size and no embedding table."""
    return not layer.tables and layer.weight.shape[1] % group == 0


def _replace(model: nn.Module, layer: Layer, packed: Packed) -> None:
    if layer.linear is not None:
        model.set_submodule(layer.linear, QuantizedLinear(packed, layer.bias))
    for table in layer.tables:
        model.set_submodule(table, QuantizedEmbedding(packed))
