"""A decoder's step compiled by torch.compile when it first runs, with what that cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException, Unsupported
from transformers import CompileConfig

from precast.runtime.errors import ExportError

from ..checkpoint.describe import describe_error
from ..quiet import silence

__all__ = ["CompiledStep"]

_MOST_SHAPES = 64


class CompiledStep:
    """Calls a model through torch.compile: one graph for each shape, or several where one cannot be made.

    Attributes:
        seconds: what calls took that had to compile first.
        graphs: how many graphs were compiled.
        is_whole: whether each step is one graph.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seconds, self.graphs, self.is_whole = 0.0, 0, True
        # Each batch size is a shape of its own; beyond the limit PyTorch would go on without compiling.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
        self._call = self._compile()
        # generate() asks its model for the compiled call; this one is shared with whoever steps by hand.
        model.get_compiled_call = lambda config: self

    @property
    def config(self) -> CompileConfig:
        """What tells generate() to compile, on a CPU as elsewhere."""
        config = CompileConfig()
        config._compile_all_devices = True
        return config

    def __call__(self, **inputs: Any) -> Any:
        """Run the step. Raises ExportError where torch.compile cannot compile it at all."""
        started, before = time.perf_counter(), self.graphs
        try:
            result = self._call(**inputs)
        except Unsupported:
            # Python that no graph holds runs between graphs.
            self.is_whole = False
            self._call = self._compile()
            return self(**inputs)
        except TorchDynamoException as error:
            raise ExportError(
                f"torch.compile cannot compile {type(self._model).__name__}: {describe_error(error)} Run it in the "
                f"mode eager, or compile it ahead of time: precast export."
            ) from error
        if self.graphs > before:
            self.seconds += time.perf_counter() - started
        return result

    def _compile(self) -> Any:
        return torch.compile(self._model.__call__, fullgraph=self.is_whole, dynamic=False, backend=self._count)

    def _count(self, graph: Any, examples: Any) -> Any:
        self.graphs += 1
        compile_graph = torch._dynamo.lookup_backend("inductor")
        with silence():
            return compile_graph(graph, examples)
