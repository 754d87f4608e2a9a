"""Graph -> graph: fusions into ONNX Runtime's operators, and the tidying that makes two exports identical."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter.ort_fusions import _core

from precast.runtime.artifact.schema import Graph

from .pack_projections import PackSiblings
from .rotary import FoldRotary
from .split_transposes import SplitBatchTransposes

__all__ = ["RemoveProvenance", "optimize"]

_NORMALIZATIONS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def optimize(model: ir.Model, graph: Graph) -> None:
    """Rewrite `model` in place. Every rewrite is exact."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    with _sound_fusions():
        fuse_for_onnxruntime(model, "cpu")
    for each in (
        RestoreConstants(),
        FlattenProducts(),
        SplitBatchTransposes(),
        RemoveIdleReshapes(),
        PackSiblings(),
        FoldRotary(graph),
        common.RemoveUnusedNodesPass(),
        RemoveIdleOutputs(),
        common.RemoveUnusedOpsetsPass(),
        RemoveProvenance(),
        common.NameFixPass(),
    ):
        each(model)


@contextmanager
def _sound_fusions() -> Iterator[None]:
    """Within this block onnxscript fuses nothing whose conditions it does not ask.

    No rotation of a part of each head: where lengths are static, the fusion of attention that follows makes the
    rotation of its queries anew and forgets that it is of a part. No grouped heads: it takes any mask for a causal one
    and position 0 for all positions, so that ONNX Runtime refuses what comes of it, or padding is seen.
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


class RestoreConstants(ir.passes.InPlacePass):
    """Register constants that nodes read and the graph has lost, as it does where folding gives two one name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give every such constant a name of its own."""
        known, modified = model.graph.initializers, False
        for value in [value for node in model.graph for value in node.inputs if value is not None]:
            if value.producer() is not None or value.const_value is None or known.get(value.name or "") is value:
                continue
            value.name = f"{value.name}_restored_{len(known)}"
            model.graph.register_initializer(value)
            modified = True
        return ir.passes.PassResult(model, modified)


class FlattenProducts(ir.passes.InPlacePass):
    """Flatten batch and length again where the fusion of attention forgot that a product of matrices wants it.

    GPT-2's `Conv1D` merges heads and flattens batch and length in one reshape, and onnxscript's fusion takes whatever
    reshape follows attention as one to [batch, length, heads * width]. A `Gemm` of that is a graph that nobody opens.
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


class RemoveIdleReshapes(ir.passes.InPlacePass):
    """Drop reshapes that lead back to a shape that was there before.

    Attention takes and gives [batch, length, heads * width], modelling code thinks in [batch, length, heads, width]:
    what lies between is eight reshapes per layer, there and back.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Read every reshape's result from the earliest value of the same shape that it was made of."""
        modified = False
        for node in model.graph:
            if node.op_type == "GroupQueryAttention" and node.outputs[0].shape is None:
                # Its first output has the shape of its query, which shape inference does not know.
                node.outputs[0].shape = node.inputs[0].shape if node.inputs[1] is not None else None
            if node.op_type == "Reshape" and (earlier := _same_before(node)) is not None:
                node.outputs[0].replace_all_uses_with(earlier)
                modified = True
        return ir.passes.PassResult(model, modified)


def _same_before(node: ir.Node) -> ir.Value | None:
    """The earliest value above a chain of reshapes with the very shape of its result."""
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


class RemoveIdleOutputs(ir.passes.InPlacePass):
    """Drop what normalizations give besides and nobody reads: their fusion names all four outputs, and other providers
    than the CPU refuse those that they have no code for."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut every fused normalization off after its last output that is read; those before are optional too."""
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
