"""Graph -> graph: fusions into ONNX Runtime's operators, and the tidying that makes two exports identical."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from precast.runtime.artifact.schema import Graph

__all__ = ["RemoveProvenance", "optimize"]


def optimize(model: ir.Model, graph: Graph) -> None:
    """Rewrite `model` in place. Every rewrite is exact."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(model, "cpu")
    for each in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        RemoveProvenance(),
        common.NameFixPass(),
    ):
        each(model)


class RemoveProvenance(ir.passes.InPlacePass):
    """Drop metadata and doc strings: stack traces name files of the machine that exported."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear every node, value and graph of the model."""
        return common.ClearMetadataAndDocStringPass()(model)
