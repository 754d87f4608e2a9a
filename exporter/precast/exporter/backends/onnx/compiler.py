"""Programs -> ONNX graphs and one file of weights."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import msgspec
import onnx_ir as ir

from precast.runtime.artifact.schema import Compiler, Graph, Host, Variant

from ...kinds.trace import Program
from ...options import ExportOptions
from ...progress import progress
from ...quiet import silence
from .. import Compiled, release_of
from ..program_hash import hash_programs
from .lowering import LOGGERS, lower
from .options import OnnxOptions
from .passes import optimize
from .qdq import write_qdq
from .torch_patches import forget_matches
from .weights import save_models

__all__ = ["OnnxCompiler", "oldest_runtime"]


class OnnxCompiler:
    """`torch.onnx` with our lowering of cached attention, then fusions into ONNX Runtime's operators, or what replaces
    them by standard ones."""

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """See ProgramCompiler."""
        graphs, models, programs = [], [], list(programs)
        own: OnnxOptions = options.backend_options
        traced = hash_programs(program.exported for program in programs)
        for done, program in enumerate(programs):
            progress(2 * done, 2 * len(programs) + 1, f"{program.graph.name} in ONNX's operators")
            words = "quantized in standard ones" if own.is_standard else "in ONNX Runtime's own"
            with forget_matches():
                model = lower(program, is_standard=own.is_standard)
                progress(2 * done + 1, 2 * len(programs) + 1, f"{program.graph.name} {words}")
                with silence(*LOGGERS):
                    if own.is_standard:
                        write_qdq(model)
                    else:
                        optimize(model, program.graph)
            models.append(model)
            graphs.append(msgspec.structs.replace(program.graph, file=f"{program.graph.name}.onnx"))
        progress(2 * len(programs), 2 * len(programs) + 1, "weights")
        weights = save_models(models, [stage / graph.file for graph in graphs], stage / "model.onnx.data")
        return Compiled(
            graphs=graphs,
            weights=weights,
            host=Host(platforms=[], device="cpu", isa=[], min_versions={"onnxruntime": oldest_runtime(graphs, models)}),
            compiler=Compiler(
                name="torch.onnx",
                version=version("onnxscript"),
                options={"opset": models[0].opset_imports[""], **({"format": own.format} if own.is_standard else {})},
                torch=release_of("torch"),
                transformers=version("transformers"),
            ),
            program=traced,
        )

    def write_weights(self, programs: Iterable[Program], stage: Path, old: Variant, options: ExportOptions) -> Compiled:
        """See WritesWeights: nothing is compiled here, and small weights lie in the graphs."""
        return self.compile(programs, stage, options)


def oldest_runtime(graphs: list[Graph], models: list[ir.Model]) -> str:
    """The oldest ONNX Runtime that gives these answers.

    Before 1.32, its optimizer merges a Pad with zeros into the MaxPool after it, whose own padding is the lowest
    number; before 1.31, GroupQueryAttention's local window is one key wider, and it has no int8 caches. 1.23 is the
    last for Python 3.10.
    """
    if any(_is_padded_max_pool(node) for model in models for node in model.graph):
        return "1.32"
    is_new = any(
        layer.dtype == "int8" or (layer.window is not None and layer.window < graph.capacity)
        for graph in graphs
        for layer in graph.cache
    )
    return "1.31" if is_new else "1.23"


def _is_padded_max_pool(node: ir.Node) -> bool:
    source = node.inputs[0].producer() if node.op_type == "MaxPool" and node.inputs[0] is not None else None
    return source is not None and source.op_type == "Pad"
