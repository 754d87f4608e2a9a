"""Bind graphs to inputs of nothing but padding: to open them, and to time them on their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..artifact.schema import Dim, Graph
from ..inputs.tensors import allocate, storage_dtype
from . import Engine, Step

__all__ = ["bind_blank"]

Arrays = dict[str, np.ndarray[Any, Any]]


def bind_blank(engine: Engine, graph: Graph, caches: Arrays) -> Step:
    """Bind a graph to padding at its largest sizes; for a decoder one step, over empty caches. `caches` holds those of
    the model by name, and other inputs that are not to be made here; it gets the caches that it lacks."""
    is_decoder = graph.role != "encode"
    places = {layer.key_out: layer.key_in for layer in graph.cache}
    places |= {layer.value_out: layer.value_in for layer in graph.cache}
    inputs = {
        spec.name: np.full(_binding_sizes(spec.shape, is_decoder), spec.pad, storage_dtype(spec.dtype))
        for spec in graph.inputs
        if spec.name not in caches
    }
    caches.update({name: inputs[name] for name in places.values() if name in inputs})
    inputs |= {spec.name: caches[spec.name] for spec in graph.inputs if spec.name in caches}
    outputs = {
        spec.name: inputs[places[spec.name]]
        if spec.name in places
        else allocate(_binding_sizes(spec.shape, is_decoder), spec.dtype)
        for spec in graph.outputs
    }
    return engine.bind(graph.name, inputs, outputs)


def _binding_sizes(shape: list[int | Dim], is_decoder: bool) -> list[int]:
    return [size if isinstance(size, int) else size.min if is_decoder else size.max for size in shape]
