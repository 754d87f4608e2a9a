"""The `onnx` backend: graphs of ONNX Runtime's operators, weights in one memory-mapped file beside them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import msgspec

from precast.runtime.artifact.schema import Compiler, Host

from ...trace import Program
from .. import Compiled
from .lowering import lower
from .passes import optimize
from .weights import save

__all__ = ["OnnxCompiler"]


class OnnxCompiler:
    """`torch.onnx` with our lowering of cached attention, then fusions into ONNX Runtime's operators."""

    def compile(self, programs: Iterable[Program], stage: Path) -> Compiled:
        """See ProgramCompiler."""
        graphs, models = [], []
        for program in programs:
            model = lower(program)
            optimize(model, program.graph)
            models.append(model)
            graphs.append(msgspec.structs.replace(program.graph, file=f"{program.graph.name}.onnx"))
        weights = save(models, [stage / graph.file for graph in graphs], stage / "model.onnx.data")
        return Compiled(
            graphs=graphs,
            weights=weights,
            host=Host(platforms=[], device="cpu", isa=[], min_versions={"onnxruntime": _minimum_runtime()}),
            compiler=Compiler(
                name="torch.onnx",
                version=version("onnxscript"),
                options={"opset": models[0].opset_imports[""]},
                torch=version("torch").split("+")[0],
                transformers=version("transformers"),
            ),
        )


def _minimum_runtime() -> str:
    """GroupQueryAttention computes our attention on the CPU, caches in place, from this release on (tested)."""
    return "1.31"
