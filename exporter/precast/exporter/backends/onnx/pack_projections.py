"""Pack quantized projections of one input into one layer: query, key and value; gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .initializers import add_initializer

__all__ = ["PackProjections"]

_CODES, _SCALES, _ZEROS, _BIAS = 1, 2, 3, 5
_SAME = ("K", "bits", "block_size", "accuracy_level")


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
    split = ir.Node(
        "", "Split", [packed.outputs[0], lengths], [ir.AttrInt64("axis", -1)], num_outputs=len(nodes),
        name=f"{first.name}_split",
    )  # fmt: skip
    shape = first.outputs[0].shape
    packed.outputs[0].dtype = first.outputs[0].dtype
    packed.outputs[0].shape = None if shape is None else ir.Shape([*list(shape)[:-1], sum(sizes)])
    graph.insert_before(first, [packed, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        part.dtype, part.shape = node.outputs[0].dtype, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(part)
    graph.remove(list(nodes), safe=True)


def _concat_inputs(graph: ir.Graph, nodes: Sequence[ir.Node], index: int) -> ir.Value | None:
    parts = [node.inputs[index] if len(node.inputs) > index else None for node in nodes]
    arrays = [part.const_value.numpy() for part in parts if part is not None and part.const_value is not None]
    if not arrays:
        return None
    return add_initializer(graph, ir.tensor(np.concatenate(arrays), name=f"{nodes[0].name}_{index}"))


def _concat_bias(graph: ir.Graph, nodes: Sequence[ir.Node], sizes: Sequence[int]) -> ir.Value | None:
    """Concatenate biases, with zeros for a layer that has none."""
    given = [node.inputs[_BIAS] if len(node.inputs) > _BIAS else None for node in nodes]
    if not any(given):
        return None
    arrays = [
        np.zeros(size, np.float32) if value is None or value.const_value is None else value.const_value.numpy()
        for value, size in zip(given, sizes, strict=True)
    ]
    return add_initializer(graph, ir.tensor(np.concatenate(arrays), name=f"{nodes[0].name}_bias"))
