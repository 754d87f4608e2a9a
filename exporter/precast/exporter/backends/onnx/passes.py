"""Graph passes: fusions into ONNX Runtime's operators, and clean-up that makes two exports identical."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter.ort_fusions import _core

from precast.runtime.artifact.schema import Graph

from .adapter_branches import AddAdapterBranches
from .pack_projections import PackProjections, pack_matmuls
from .rotary import FoldRotary
from .split_transposes import SplitBatchTransposes

__all__ = ["RemoveProvenance", "optimize"]

_NORMALIZATIONS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def optimize(model: ir.Model, graph: Graph) -> None:
    """Rewrite `model` in place. Every rewrite is exact."""
    from transformers.exporters import onnxruntime_fusions

    with _without_unsound_fusions(), _packing_lazily(onnxruntime_fusions):
        onnxruntime_fusions.fuse_for_onnxruntime(model, "cpu")
    for each in (
        RestoreConstants(),
        FlattenGemmInputs(),
        SplitBatchTransposes(),
        RemoveRedundantReshapes(),
        PackProjections(),
        FoldRotary(graph),
        AddAdapterBranches(),
        common.RemoveUnusedNodesPass(),
        RemoveUnusedOutputs(),
        common.RemoveUnusedOpsetsPass(),
        RemoveProvenance(),
        common.NameFixPass(),
    ):
        each(model)


@contextmanager
def _without_unsound_fusions() -> Iterator[None]:
    """Within this block disable the fusions of onnxscript that do not check their conditions.

    Partial rotary embedding: where lengths are static, the fusion of attention that follows rebuilds the rotation of
    its queries and forgets that it is partial. Grouped-query attention: it takes any mask for a causal one and position
    0 for all positions, so that ONNX Runtime refuses the node, or padding is attended to.
    """
    names = ("fuse_partial_rotary_embedding", "fuse_gqa")
    before = {name: getattr(_core, name) for name in names}
    for name in names:
        setattr(_core, name, lambda model, **_: 0)
    try:
        yield
    finally:
        for name, fusion in before.items():
            setattr(_core, name, fusion)


@contextmanager
def _packing_lazily(fusions: Any) -> Iterator[None]:
    """Within this block transformers' fusions pack projections as we do, without a copy of their weights."""
    before = fusions._STEPS
    fusions._STEPS = [
        (pack_matmuls if step is fusions._pack_sibling_matmuls else step, providers) for step, providers in before
    ]
    try:
        yield
    finally:
        fusions._STEPS = before


class RestoreConstants(ir.passes.InPlacePass):
    """Register constants that nodes read but the graph has lost: constant folding can give two of them one name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Register every such constant under a unique name."""
        known, modified = model.graph.initializers, False
        for value in [value for node in model.graph for value in node.inputs if value is not None]:
            if value.producer() is not None or value.const_value is None or known.get(value.name or "") is value:
                continue
            value.name = f"{value.name}_restored_{len(known)}"
            model.graph.register_initializer(value)
            modified = True
        return ir.passes.PassResult(model, modified)


class FlattenGemmInputs(ir.passes.InPlacePass):
    """Flatten batch and length for `Gemm`, where the fusion of attention removed the reshape that did.

    GPT-2's `Conv1D` merges heads and flattens batch and length in one reshape, and onnxscript's fusion takes whatever
    reshape follows attention as one to [batch, length, heads * width]. A `Gemm` of that is an invalid graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Reshape the first input of every `Gemm` that has three dimensions to [-1, its width]."""
        unfit = [node for node in model.graph if node.op_type == "Gemm" and _rank(node.inputs[0]) == 3]
        for node in unfit:
            source, weight = node.inputs[:2]
            width = weight.shape[1 if node.attributes.get_int("transB", 0) else 0]
            shape = ir.Value(name=f"{source.name}_matrix_shape", const_value=ir.tensor([-1, width]))
            flat = ir.Value(name=f"{source.name}_matrix", type=source.type, shape=ir.Shape([None, width]))
            model.graph.register_initializer(shape)
            model.graph.insert_before(node, ir.node("Reshape", [source, shape], outputs=[flat]))
            node.replace_input_with(0, flat)
        return ir.passes.PassResult(model, bool(unfit))


def _rank(value: ir.Value) -> int | None:
    """The number of dimensions, which fusions leave out where a reshape still says it."""
    if value.shape is not None:
        return len(value.shape)
    producer = value.producer()
    sizes = producer.inputs[1].shape if producer is not None and producer.op_type == "Reshape" else None
    return sizes[0] if sizes else None


class RemoveRedundantReshapes(ir.passes.InPlacePass):
    """Drop reshapes that restore a shape that an earlier value has.

    Attention takes and returns [batch, length, heads * width], modelling code works in [batch, length, heads, width]:
    that makes eight reshapes per layer, back and forth.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every reshape's result by the earliest value of the same shape in the chain above it."""
        modified = False
        for node in model.graph:
            if node.op_type == "GroupQueryAttention" and node.outputs[0].shape is None:
                # Its first output has the shape of its query, which shape inference does not know.
                node.outputs[0].shape = node.inputs[0].shape if node.inputs[1] is not None else None
            if node.op_type == "Reshape" and (earlier := _find_earlier_value(node)) is not None:
                node.outputs[0].replace_all_uses_with(earlier)
                modified = True
        return ir.passes.PassResult(model, modified)


def _find_earlier_value(node: ir.Node) -> ir.Value | None:
    """The earliest value above a chain of reshapes that has exactly its result's shape."""
    target, value, found = node.outputs[0], node.inputs[0], None
    if target.is_graph_output() or not target.uses():
        return None
    while value is not None:
        if _equal_shapes(value.shape, target.shape):
            found = value
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else None
    return found


def _equal_shapes(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Known and equal; two dimensions of one name are equal, unnamed ones are not known."""
    if one is None or other is None or len(one) != len(other):
        return False
    known = all(isinstance(dim, int) or dim.value is not None for dim in one)
    return known and list(one) == list(other)


class RemoveUnusedOutputs(ir.passes.InPlacePass):
    """Drop unused outputs of fused normalizations: the fusion names all four, and providers other than the CPU refuse
    outputs that they do not implement."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut the outputs of every fused normalization off after the last one that is used."""
        modified = False
        for node in [node for node in model.graph if node.op_type in _NORMALIZATIONS]:
            read = [index for index, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
            if read and (size := read[-1] + 1) < len(node.outputs):
                node.resize_outputs(size)
                modified = True
        return ir.passes.PassResult(model, modified)


class RemoveProvenance(ir.passes.InPlacePass):
    """Drop metadata and doc strings: stack traces name files of the machine that exported."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear every node, value and graph of the model."""
        return common.ClearMetadataAndDocStringPass()(model)
