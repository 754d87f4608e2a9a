"""Split batch transposes off FusedMatMul where ONNX Runtime's CPU kernel does not take them."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["SplitBatchTransposes"]


class SplitBatchTransposes(ir.passes.InPlacePass):  # type: ignore[misc]
    """Write a batch transpose as a node of its own where `FusedMatMul` refuses it: its kernel needs both inputs to have
    the same rank, at least 3 (https://github.com/microsoft/onnxscript/issues/3156)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Split the transposes of every FusedMatMul whose inputs differ in rank or have less than 3 dimensions."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "FusedMatMul" and _is_refused(node):
                for index, side in enumerate("AB"):
                    modified |= _split_transpose(node, index, side)
        return ir.passes.PassResult(model, modified)


def _is_refused(node: ir.Node) -> bool:
    ranks = {len(value.shape) for value in node.inputs[:2] if value is not None and value.shape is not None}
    return len(ranks) > 1 or max(ranks, default=3) < 3


def _split_transpose(node: ir.Node, index: int, side: str) -> bool:
    """Write one input's transpose as a node: `transBatchA` moves the first dimension before the last, with `transA`
    behind it."""
    source = node.inputs[index]
    if not node.attributes.get_int(f"transBatch{side}", 0) or source is None or source.shape is None:
        return False
    rank = len(source.shape)
    is_flipped = node.attributes.get_int(f"trans{side}", 0)
    order = [*range(1, rank), 0] if is_flipped else [*range(1, rank - 1), 0, rank - 1]
    turned = ir.Value(
        name=f"{node.outputs[0].name}_{side}",
        type=source.type,
        shape=ir.Shape([source.shape[axis] for axis in order]),
    )
    node.graph.insert_before(node, ir.node("Transpose", [source], {"perm": order}, outputs=[turned]))
    node.replace_input_with(index, turned)
    node.attributes.pop(f"transBatch{side}")
    node.attributes.pop(f"trans{side}", None)
    return True
