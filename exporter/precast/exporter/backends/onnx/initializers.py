"""Tensors that a pass adds to a graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

__all__ = ["add_initializer"]


def add_initializer(graph: ir.Graph, tensor: Any) -> ir.Value:
    """Register a tensor under its own name; returns the value that nodes read."""
    value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    graph.register_initializer(value)
    return value
