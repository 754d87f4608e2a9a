"""Write adapters out in ONNX's operators, in branches that run only where a row of the batch has one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .contrib_ops import LORA
from .initializers import add_initializer

__all__ = ["AddAdapterBranches"]


class AddAdapterBranches(ir.passes.InPlacePass):  # type: ignore[misc]
    """One `If` for all layers with the same input (query, key and value; gate and up): a branch
    costs as much as a small product."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every `Lora`; outputs of those that share an input come from one node."""
        graph = model.graph
        families: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in graph:
            if node.op_type == LORA:
                families[node.inputs[1]].append(node)
        if families:
            condition = _find_active(graph, next(iter(families.values()))[0])
            for nodes in families.values():
                _branch(graph, nodes, condition)
            graph.sort()
        return ir.passes.PassResult(model, bool(families))


def _find_active(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Whether any row has an adapter."""
    slots = node.inputs[3]
    largest = ir.node("ReduceMax", [slots], {"keepdims": 0}, name="lora_largest_slot")
    zero = _find_initializer(graph, "lora_no_slot", np.array(0))
    active = ir.node("Greater", [largest.outputs[0], zero], name="lora_is_active")
    graph.insert_before(node, [largest, active])
    active.outputs[0].dtype, active.outputs[0].shape = ir.DataType.BOOL, ir.Shape([])
    return active.outputs[0]


def _branch(graph: ir.Graph, nodes: Sequence[ir.Node], condition: ir.Value) -> None:
    """Replace layers' adapters by one `If`, after the last of these layers."""
    name, last = nodes[0].name, nodes[-1]
    added = [each for index, node in enumerate(nodes) for each in _add_adapter(graph, node, f"{name}_{index}")]
    passed = [ir.node("Identity", [node.inputs[0]], name=f"{name}_{index}_same") for index, node in enumerate(nodes)]
    branch = ir.node(
        "If",
        [condition],
        {
            "then_branch": _subgraph(f"{name}_then", added, [each for each in added if each.op_type == "Add"], nodes),
            "else_branch": _subgraph(f"{name}_else", passed, passed, nodes),
        },
        num_outputs=len(nodes),
        name=f"{name}_if",
    )
    graph.insert_after(last, branch)
    for node, result in zip(nodes, branch.outputs, strict=True):
        before, result.dtype = node.outputs[0], ir.DataType.FLOAT
        result.shape, result.name, before.name = before.shape, before.name, None
        before.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(list(nodes), safe=True)


def _subgraph(name: str, nodes: list[ir.Node], ends: list[ir.Node], like: Sequence[ir.Node]) -> ir.Graph:
    for end, node in zip(ends, like, strict=True):
        end.outputs[0].dtype, end.outputs[0].shape = ir.DataType.FLOAT, node.outputs[0].shape
    return ir.Graph([], [end.outputs[0] for end in ends], nodes=nodes, name=name)


def _add_adapter(graph: ir.Graph, node: ir.Node, name: str) -> list[ir.Node]:
    """The nodes of one layer's adapters; the last is an Add."""
    y, x, weights, slots = node.inputs
    width = weights.shape[-1]
    inputs, outputs = x.shape[-1], y.shape[-1]
    assert inputs + outputs == width, "a row holds one of A and one of B"
    sizes = _find_initializer(graph, f"lora_sizes_{inputs}_{outputs}", np.array([inputs, outputs]))
    own = ir.node("Gather", [weights, slots], {"axis": 0}, name=f"{name}_own")
    split = ir.node("Split", [own.outputs[0], sizes], {"axis": -1}, num_outputs=2, name=f"{name}_split")
    inner = ir.Node(
        "com.microsoft", "FusedMatMul", [x, split.outputs[0]], [ir.AttrInt64("transB", 1)], name=f"{name}_inner"
    )
    outer = ir.node("MatMul", [inner.outputs[0], split.outputs[1]], name=f"{name}_outer")
    return [own, split, inner, outer, ir.node("Add", [y, outer.outputs[0]], name=f"{name}_sum")]


def _find_initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    return add_initializer(graph, ir.tensor(array, name=name))
