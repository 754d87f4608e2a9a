"""Pack projections of one input into one layer: query, key and value; gate and up.

Packed weights are computed when they are read, which is when they are written: they never exist all at once beside
those that they are made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .initializers import add_initializer

__all__ = ["PackProjections", "pack_matmuls"]

_CODES, _SCALES, _ZEROS, _BIAS = 1, 2, 3, 5
_SAME = ("K", "bits", "block_size", "accuracy_level")
_MATRIX = 2


def pack_matmuls(model: ir.Model) -> None:
    """Pack the `MatMul`s that read one value with constant weights [K, N].

    This stands for the step among transformers' fusions that does the same, under the same names, with a copy of the
    weights.
    """
    graph = model.graph
    values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    for place, value in enumerate(values):
        nodes = [user for user, index in value.uses() if index == 0 and _multiplies_by_constant(user)]
        weights = [node.inputs[1].const_value for node in nodes]
        formats = {(node.graph, weight.dtype, weight.shape[0]) for node, weight in zip(nodes, weights, strict=True)}
        if len(nodes) > 1 and len(formats) == 1:
            name, sizes = f"packed_matmul_{place}", [weight.shape[1] for weight in weights]
            packed = add_initializer(graph, _concatenate(weights, 1, name))
            lengths = add_initializer(graph, ir.tensor(np.array(sizes), name=f"{name}_sizes"))
            first = min(nodes, key=list(graph).index)
            _replace_by_packed(graph, first, nodes, ir.node("MatMul", [value, packed]), lengths)


def _multiplies_by_constant(node: ir.Node) -> bool:
    if node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[1].const_value is None:
        return False
    return len(node.inputs[1].const_value.shape) == _MATRIX


class PackProjections(ir.passes.InPlacePass):  # type: ignore[misc]
    """One MatMulNBits over the rows of all, and a Split: activations are quantized once and threads start once."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack the nodes that read one value in one format; outputs keep the order of the nodes."""
        groups: dict[Any, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if node.op_type == "MatMulNBits":
                groups[_format(node)].append(node)
        families = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in families:
            _pack(model.graph, nodes)
        return ir.passes.PassResult(model, bool(families))


def _format(node: ir.Node) -> Any:
    has_zeros = len(node.inputs) > _ZEROS and node.inputs[_ZEROS] is not None
    return (node.inputs[0], has_zeros, *(node.attributes[name].as_int() for name in _SAME))


def _pack(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first, sizes = nodes[0], [node.attributes["N"].as_int() for node in nodes]
    inputs = [
        first.inputs[0],
        *(_concat_inputs(graph, nodes, index) for index in (_CODES, _SCALES, _ZEROS)),
        None,
        _concat_bias(graph, nodes, sizes),
    ]
    attributes = [*(first.attributes[name] for name in _SAME), ir.AttrInt64("N", sum(sizes))]
    packed = ir.Node("com.microsoft", "MatMulNBits", inputs, attributes, num_outputs=1, name=f"{first.name}_packed")
    lengths = add_initializer(graph, ir.tensor(np.array(sizes), name=f"{first.name}_sizes"))
    _replace_by_packed(graph, first, nodes, packed, lengths, f"{first.name}_split")
    graph.remove(list(nodes), safe=True)


def _replace_by_packed(
    graph: ir.Graph,
    first: ir.Node,
    nodes: Sequence[ir.Node],
    packed: ir.Node,
    lengths: ir.Value,
    name: str | None = None,
) -> None:
    """Let a Split of what `packed` computes stand for the results of `nodes`, of which `first` comes first."""
    result, shape = packed.outputs[0], nodes[0].outputs[0].shape
    split = ir.node("Split", [result, lengths], {"axis": -1}, num_outputs=len(nodes), name=name)
    result.dtype = nodes[0].outputs[0].dtype
    result.shape = None if shape is None else ir.Shape([*list(shape)[:-1], int(lengths.const_value.numpy().sum())])
    graph.insert_before(first, [packed, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        before = node.outputs[0]
        part.dtype, part.shape = before.dtype, before.shape
        if before.is_graph_output():
            part.name, before.name = before.name, None
        before.replace_all_uses_with(part, replace_graph_outputs=True)


def _concat_inputs(graph: ir.Graph, nodes: Sequence[ir.Node], index: int) -> ir.Value | None:
    parts = [node.inputs[index] if len(node.inputs) > index else None for node in nodes]
    tensors = [part.const_value for part in parts if part is not None and part.const_value is not None]
    return add_initializer(graph, _concatenate(tensors, 0, f"{nodes[0].name}_{index}")) if tensors else None


def _concat_bias(graph: ir.Graph, nodes: Sequence[ir.Node], sizes: Sequence[int]) -> ir.Value | None:
    """Concatenate biases, with zeros for a layer that has none."""
    given = [node.inputs[_BIAS] if len(node.inputs) > _BIAS else None for node in nodes]
    if not any(given):
        return None
    tensors = [
        ir.tensor(np.zeros(size, np.float32)) if value is None or value.const_value is None else value.const_value
        for value, size in zip(given, sizes, strict=True)
    ]
    return add_initializer(graph, _concatenate(tensors, 0, f"{nodes[0].name}_bias"))


def _concatenate(tensors: Sequence[Any], axis: int, name: str) -> ir.LazyTensor:
    """Tensors one after another along an axis, as a tensor that is made whenever it is read."""
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    return ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis)),
        tensors[0].dtype,
        ir.Shape(shape),
        name=name,
    )
